# SPDX-License-Identifier: Apache-2.0
"""One job in a process of its own, and the file that holds what came of it."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anomalib_fractalad.benchmark.config import Job

_POLL_SECONDS = 0.5


class Record:
    """What is known of a job, kept in a JSON file.

    Args:
        file: The file; it may be yet to be written.

    Attributes:
        content: ``status`` (``"done"``, ``"failed"``, ``"timed out"``, ``"running"`` or none), ``reason``, ``stage``,
            the job's ``spec`` and what was measured.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {}
        self.read()

    @property
    def folder(self) -> Path:
        """Folder of the job's pictures."""
        return self.file.with_suffix("")

    def read(self) -> None:
        """Read the file; one that is missing or torn counts as empty."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            self.content = json.loads(self.file.read_text())

    def save(self, **values: Any) -> None:
        """Add values and write the file, whole or not at all."""
        self.content.update(values)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1))
        new.replace(self.file)


def record_of(job: Job, output: Path) -> Record:
    """The record of a job in an output folder."""
    return Record(output / "jobs" / f"{job.key}.json")


def run_in_process(
    job: Job,
    record: Record,
    time_limit: float | None = None,
    show_stage: Callable[[str], object] = lambda _: None,
) -> None:
    """Run a job in a process of its own; whatever happens to it ends up in its record.

    Args:
        job: The job.
        record: Its record.
        time_limit: Seconds after which the process and its children are killed.
        show_stage: Called with the name of each stage that the job comes to.
    """
    record.content = {}
    record.save(job=str(job), spec=job.spec, status="running", stage="starting")
    log = record.file.with_suffix(".log")
    command = [sys.executable, "-m", __name__, str(record.file)]
    end = math.inf if time_limit is None else time.monotonic() + time_limit
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)  # noqa: S603
        try:
            while process.poll() is None:
                left = end - time.monotonic()
                if left <= 0:
                    _kill(process)
                    record.read()
                    reason = f"ran out of time: {time_limit:g} s were over in the stage {record.content['stage']!r}"
                    if record.content["status"] == "running":
                        record.save(status="timed out", reason=reason)
                    return
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, _POLL_SECONDS))
                stage = record.content["stage"]
                record.read()
                if record.content["stage"] != stage:
                    show_stage(record.content["stage"])
        finally:
            _kill(process)
    record.read()
    if record.content["status"] == "running":
        code = process.returncode
        fate = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -9 else ""  # SIGKILL
        stage, last = record.content["stage"], (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        record.save(status="failed", reason=f"the process {fate}{hint} in the stage {stage!r}; it said last: {last}")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)  # workers of data loaders included
    process.wait()


def describe(error: Exception) -> str:
    """One line about an error, its cause included where the message has none."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else repr(error.__cause__ or error)


def refuse_large_downloads(model: dict[str, Any]) -> None:
    """Refuse EfficientAd without its ImageNette images, which anomalib would download (1.6 GB).

    Args:
        model: ``class_path`` and ``init_args``.

    Raises:
        FileNotFoundError: If the folder is missing.
    """
    folder = model["init_args"].get("imagenet_dir")
    if folder is not None and not Path(folder).is_dir():
        msg = (
            f"{model['class_path'].rpartition('.')[2]} needs the ImageNette images (imagenette2), and there is no "
            f"folder {folder}; give init_args.imagenet_dir a folder of them"
        )
        raise FileNotFoundError(msg)


def main(file: Path) -> int:
    """Run the job of a record.

    Args:
        file: The record's file.

    Returns:
        The exit status.
    """
    record = Record(file)
    spec = record.content["spec"]
    try:
        refuse_large_downloads(spec["model"])
        from anomalib_fractalad.benchmark.measure import measure  # noqa: PLC0415

        measure(spec, record.folder, record.save)
    except Exception as error:
        traceback.print_exc()
        record.save(status="failed", reason=describe(error))
        return 1
    record.save(status="done", stage="done")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
