# SPDX-License-Identifier: Apache-2.0
"""What a build has done so far, and how it tells people."""

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from anomalib_fractalad.training.loggers import LIGHTNING

_LOGGERS = {
    **dict.fromkeys(("anomalib", "anomalib_fractalad", *LIGHTNING), logging.INFO),
    **dict.fromkeys(("timm", "nncf", "onnxscript", "torch", "py.warnings"), logging.WARNING),
}
_SHOW_SECONDS = 10.0  # between lines where there is no terminal
_STAGES = 5


class State:
    """What a build has done so far, kept in a JSON file so that a second call goes on.

    Args:
        file: The file; it may be yet to be written.

    Attributes:
        content: Plain data; ``request`` is what was asked for.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.content = json.loads(file.read_text(encoding="utf-8"))

    def is_of(self, request: Mapping[str, Any]) -> bool:
        """Whether there is a build of what is asked for.

        Args:
            request: What is asked for, as plain data.

        Raises:
            ValueError: If the file is of a build of something else; the message says what differs.
        """
        asked = json.loads(json.dumps(request))
        before = self.content.get("request")
        if before is not None and before != asked:
            changed = [name for name in asked if before.get(name) != asked[name]]
            what = ", ".join(f"{name} was {_short(before.get(name))} and is {_short(asked[name])}" for name in changed)
            msg = (
                f"{self.file.parent.parent} holds a build of something else ({what}). Take another --output, or give "
                "--restart to build anew there"
            )
            raise ValueError(msg)
        return before is not None

    def save(self, **values: Any) -> None:
        """Add values and write the file, whole or not at all."""
        self.content.update(values)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
        new.replace(self.file)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Progress:
    """Tells people what a build is doing, in lines, and on a terminal also how far it is.

    Args:
        stream: Where to; none for silence.
    """

    def __init__(self, stream: TextIO | None = sys.stdout) -> None:
        self._stream = stream
        self._begin = self._shown = time.monotonic()
        self._length = 0
        self._stage = 0

    def stage(self, text: str) -> None:
        """Begin a stage."""
        self._stage += 1
        self.line(f"[{self._stage}/{_STAGES}] {text}")

    def line(self, text: str) -> None:
        """Tell a line."""
        if self._stream is not None:
            self._clear()
            print(text, file=self._stream, flush=True)

    def step(self, text: str, seconds_left: float | None = None) -> None:
        """Tell how far a stage is; the next step takes its place.

        Args:
            text: A few words.
            seconds_left: Time left of it, if it can be told.
        """
        left = "" if seconds_left is None else f", {duration(seconds_left)} left"
        if self._stream is None:
            return
        if self._stream.isatty():
            self._clear()
            self._stream.write(f"      {text}{left}")
            self._stream.flush()
            self._length = len(text) + len(left) + 6
        elif time.monotonic() - self._shown > _SHOW_SECONDS:
            self._shown = time.monotonic()
            print(f"      {text}{left}", file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._stream is not None and self._length:
            self._stream.write(f"\r{' ' * self._length}\r")
        self._length = 0

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begin


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, for people."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


@contextlib.contextmanager
def quiet(file: Path) -> Iterator[None]:
    """Let what libraries log and warn go to a file for a while, but for what failed.

    Args:
        file: The file; lines are added to it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = {logging.getLogger(name): level for name, level in _LOGGERS.items()}
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    show = warnings.showwarning
    try:
        for logger, level in loggers.items():
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(level)
        logging.captureWarnings(capture=True)
        yield
    finally:
        logging.captureWarnings(capture=False)
        warnings.showwarning = show
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        handler.close()


@contextlib.contextmanager
def told(progress: Progress, name: str) -> Iterator[None]:
    """Tell what a logger says for a while.

    Args:
        progress: Tells people.
        name: Name of the logger.
    """
    handler = _Told(progress)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Told(logging.Handler):
    """Passes on what is logged."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.line(f"      {record.getMessage()}")
