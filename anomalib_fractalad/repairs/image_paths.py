# SPDX-License-Identifier: Apache-2.0
"""Paths with letters outside ASCII are refused as "non-printable"."""

from contextlib import AbstractContextManager
from typing import Any

from .base import Repair
from .replacing import replace, replaced, while_the_engine_runs

_MODULE = "anomalib.data.utils.path"


def _replacement() -> tuple[str, str, Any]:
    from anomalib_fractalad.image_files import has_control_characters  # noqa: PLC0415

    return _MODULE, "contains_non_printable_characters", has_control_characters


def every_script() -> AbstractContextManager[None]:
    """Let anomalib's check of paths pass letters of any script, for the duration."""
    return replaced(*_replacement())


def _apply(for_all: bool) -> None:
    if for_all:
        replace(*_replacement())
    else:
        while_the_engine_runs(IMAGE_PATHS, every_script)


IMAGE_PATHS = Repair(
    name="image paths",
    defect='Paths with letters outside ASCII are refused as "non-printable".',
    versions=">=2.7,<2.8",
    modules=(_MODULE, "anomalib.engine.engine"),
    apply=_apply,
)
