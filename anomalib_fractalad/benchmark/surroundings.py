# SPDX-License-Identifier: Apache-2.0
"""What a measurement changes around itself, for as long as it lasts."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def trusted_files() -> Iterator[None]:
    """Let anomalib's ``TorchInferencer`` read files that were written in the same run."""
    before = os.environ.get("TRUST_REMOTE_CODE")
    os.environ["TRUST_REMOTE_CODE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRUST_REMOTE_CODE"]
        else:
            os.environ["TRUST_REMOTE_CODE"] = before


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Ignore warnings, and what loggers have to say below an error.

    Args:
        *loggers: Names of loggers.
    """
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Have torch use a number of CPU threads.

    Args:
        count: The number; ``None`` leaves it as it is.
    """
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Go to a folder and back: OpenVINOInferencer keeps every model that it compiles below the current one.

    Args:
        folder: The folder.
    """
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
