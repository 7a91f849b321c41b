# SPDX-License-Identifier: Apache-2.0
"""What is known of a job: the file that holds what came of it, and what is yet to be done."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from anomalib_fractalad.benchmark.config import Job
from anomalib_fractalad.benchmark.provenance import runtime_versions

UNFINISHED = {"failed", "timed out"}


class Record:
    """What is known of a job, kept in a JSON file.

    Args:
        file: The file; it may be yet to be written.

    Attributes:
        content: ``status`` (``"done"``, ``"failed"``, ``"timed out"``, ``"running"`` or none), ``reason``, ``stage``
            and its ``progress``, the job's ``spec`` and ``measuring``, and what was measured.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {}
        self.read()

    @property
    def folder(self) -> Path:
        """Folder of the job's images and checkpoints."""
        return self.file.with_suffix("")

    @property
    def checkpoint(self) -> Path:
        """The trained model, a checkpoint of Lightning."""
        return self.folder / "model.ckpt"

    @property
    def training_checkpoint(self) -> Path:
        """The last epoch of a training that is not over, with the optimizer."""
        return self.folder / "training.ckpt"

    @property
    def is_trained(self) -> bool:
        """Whether the job can go on from its trained model."""
        return "cost" in self.content and self.checkpoint.exists() and not changed_inputs(self.content)

    @property
    def is_begun(self) -> bool:
        """Whether the job can go on within its training."""
        return "inputs" in self.content and self.training_checkpoint.exists() and not changed_inputs(self.content)

    @property
    def lock(self) -> FileLock:
        """What a call holds while it does the job."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.file.with_suffix(".lock"))

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

    def enter(self, stage: str, **values: Any) -> None:
        """Begin a stage: save its name and values, and forget how far the last stage was."""
        self.content.pop("progress", None)
        self.save(stage=stage, **values)

    def clear(self) -> None:
        """Forget what cannot be gone on from, and failures that are to be tried again."""
        if not self.is_trained:
            self.content = {"inputs": self.content["inputs"]} if self.is_begun else {}
            if not self.content:
                self.training_checkpoint.unlink(missing_ok=True)
        runtimes = self.content.get("runtimes", {})
        for runtime in [name for name, values in runtimes.items() if "reason" in values]:
            del runtimes[runtime]
        for name in ("reason", "killed", "resumed", "progress"):
            self.content.pop(name, None)


def record_of(job: Job, output: Path) -> Record:
    """The record of a job in an output folder."""
    return Record(output / "jobs" / f"{job.key}.json")


def is_missing(job: Job, record: Record, retry: bool = False) -> bool:
    """Whether anything that a job is to measure is yet to be measured.

    What ran out of time or was killed is gone on with if it left something to go on from.

    Args:
        job: The job.
        record: Its record.
        retry: Count what failed or ran out of time as missing.
    """
    content = record.content
    status = content.get("status")
    if status in UNFINISHED and not retry:
        was_stopped = status == "timed out" or content.get("killed", False)
        if not was_stopped or not (record.is_begun or record.is_trained):
            return False
        return not record.is_trained or "quality" not in content or bool(missing_runtimes(content, job.measuring))
    if status != "done" or changed_inputs(content):
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
    return {"repetitions": measuring["repetitions"], "version": runtime_versions(runtime)}


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


def describe(error: Exception) -> str:
    """One line about an error, its cause included where the message has none."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else repr(error.__cause__ or error)
