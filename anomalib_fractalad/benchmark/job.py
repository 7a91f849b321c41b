# SPDX-License-Identifier: Apache-2.0
"""One job in a process of its own, and the file that holds what came of it."""

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from anomalib_fractalad.benchmark.config import Job, runtime_version

_POLL_SECONDS = 0.5


class Record:
    """What is known of a job, kept in a JSON file.

    Args:
        file: The file; it may be yet to be written.

    Attributes:
        content: ``status`` (``"done"``, ``"failed"``, ``"timed out"``, ``"running"`` or none), ``reason``, ``stage``,
            the job's ``spec`` and ``measuring``, and what was measured.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {}
        self.read()

    @property
    def folder(self) -> Path:
        """Folder of the job's pictures and its trained model."""
        return self.file.with_suffix("")

    @property
    def checkpoint(self) -> Path:
        """The trained model, a checkpoint of Lightning."""
        return self.folder / "model.ckpt"

    @property
    def is_trained(self) -> bool:
        """Whether the job can go on from its trained model."""
        return "cost" in self.content and self.checkpoint.exists() and not changed_inputs(self.content)

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


def is_missing(job: Job, record: Record, retry: bool = False) -> bool:
    """Whether anything that a job is to measure is yet to be measured.

    Args:
        job: The job.
        record: Its record.
        retry: Count what failed or ran out of time as missing.
    """
    content = record.content
    if content.get("status") in {"failed", "timed out"}:
        return retry
    if content.get("status") != "done" or changed_inputs(content):
        return True
    other_sheet = content.get("sheet_images") != job.measuring["sheet_images"]
    return (other_sheet and record.is_trained) or bool(missing_runtimes(content, job.measuring, retry))


def missing_runtimes(content: dict[str, Any], measuring: dict[str, Any], retry: bool = False) -> list[str]:
    """Runtimes that were not measured yet, or otherwise than wanted now.

    Args:
        content: A record's.
        measuring: A job's.
        retry: Count those that failed as missing.
    """
    known = content.get("runtimes", {})
    return [
        runtime
        for runtime in measuring["runtimes"]
        if {**known.get(runtime, {}), **conditions(runtime, measuring)} != known.get(runtime)
        or (retry and "reason" in known[runtime])
    ]


def conditions(runtime: str, measuring: dict[str, Any]) -> dict[str, Any]:
    """What a runtime's figures depend on beside the trained model."""
    return {"repetitions": measuring["repetitions"], "version": runtime_version(runtime)}


def state_of(paths: Iterable[Path]) -> dict[str, str]:
    """Digest of each path's state, to notice files that were added, taken away or exchanged.

    Args:
        paths: Files and folders; those that do not exist are left out.

    Returns:
        Digest by path, of the name, size and time of change of a file or of all that is right in a folder.
    """
    state = {}
    for path in sorted({path.resolve() for path in paths}):
        entries = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
        if entries:
            facts = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
            state[str(path)] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return state


def changed_inputs(content: dict[str, Any]) -> list[str]:
    """Files and folders that a job had read and that have changed since; what is gone cannot be read again.

    Args:
        content: A record's.
    """
    before = content.get("inputs", {})
    now = state_of(map(Path, before))
    return [path for path, digest in now.items() if digest != before[path]]


def run_in_process(
    job: Job,
    record: Record,
    time_limit: float | None = None,
    show_stage: Callable[[str], object] = lambda _: None,
) -> None:
    """Run a job in a process of its own; whatever happens to it ends up in its record.

    A job whose trained model was kept goes on from there.

    Args:
        job: The job.
        record: Its record.
        time_limit: Seconds after which the process and its children are killed.
        show_stage: Called with the name of each stage that the job comes to.
    """
    if not record.is_trained:
        record.content = {}
    failed = [name for name, values in record.content.get("runtimes", {}).items() if "reason" in values]
    for runtime in failed:
        del record.content["runtimes"][runtime]
    record.content.pop("reason", None)
    record.save(job=str(job), spec=job.spec, measuring=job.measuring, status="running", stage="starting")
    log = record.file.with_suffix(".log")
    command = [sys.executable, "-m", __name__, str(record.file), str(os.getpid())]
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

        measure(record)
    except Exception as error:
        traceback.print_exc()
        record.save(status="failed", reason=describe(error))
        return 1
    record.save(status="done", stage="done")
    return 0


def end_with(parent: int) -> None:
    """End this process and its children soon after the parent, however that ends.

    Args:
        parent: The parent's process ID.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if sys.platform != "win32":  # which does not tell of a parent that ended
        end_with(int(sys.argv[2]))
    sys.exit(main(Path(sys.argv[1])))
