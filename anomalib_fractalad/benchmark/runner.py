# SPDX-License-Identifier: Apache-2.0
"""Starts a job in a process of its own, watches it, and ends it."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from anomalib_fractalad.benchmark.config import RUNTIMES, Job
from anomalib_fractalad.benchmark.record import Record, conditions

POLL_SECONDS = 0.5
WORKER = "anomalib_fractalad.benchmark.worker"

Show = Callable[[str], object]


def run_in_process(
    job: Job,
    record: Record,
    time_limit: float | None = None,
    show: Show = lambda _: None,
    tell: Show = lambda _: None,
) -> None:
    """Run a job in a process of its own; whatever happens to it ends up in its record.

    A job goes on from its trained model, or from the last epoch of its training, if there is one.

    Args:
        job: The job.
        record: Its record.
        time_limit: Seconds after which the process and its children are killed.
        show: Called with the stage of the job, and how far it is, whenever that changes.
        tell: Called with a line where the job goes on from an earlier call.
    """
    begin(job, record)
    log = record.file.with_suffix(".log")
    command = [sys.executable, "-m", WORKER, str(record.file), str(os.getpid())]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)  # noqa: S603
        try:
            is_over = _watch(process, record, time_limit, _Teller(str(job), show, tell))
        finally:
            _kill(process)
    record.read()
    if record.content["status"] != "running":
        return
    if is_over:
        words = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        record.save(status="failed", killed=process.returncode < 0, reason=_fate(process.returncode, record, words))
    else:
        _note_time_out(record, time_limit)


def begin(job: Job, record: Record) -> None:
    """Prepare a record for its job to be run, keeping what the job can go on from.

    Args:
        job: The job.
        record: Its record.
    """
    record.clear()
    record.save(job=str(job), spec=job.spec, measuring=job.measuring, status="running", stage="starting")


class _Teller:
    """Passes on what is new in a record."""

    def __init__(self, job: str, show: Show, tell: Show) -> None:
        self.job, self.show, self.tell = job, show, tell
        self.shown = ""
        self.has_told = False

    def __call__(self, content: dict[str, Any]) -> None:
        resumed = content.get("resumed")
        if resumed and not self.has_told:
            self.has_told = True
            self.tell(f"{self.job}: {describe_resumed(resumed)}")
        text = describe_stage(content)
        if text != self.shown:
            self.shown = text
            self.show(text)


def describe_resumed(resumed: dict[str, Any]) -> str:
    """A line about where a training goes on.

    Args:
        resumed: ``epochs`` and ``seconds`` that were done before, or the ``reason`` why nothing could be gone on from.
    """
    if "reason" in resumed:
        return f"training starts over: {resumed['reason']}"
    return f"training goes on after epoch {resumed['epochs']}, {_duration(resumed['seconds'])} of training so far"


def describe_stage(content: dict[str, Any]) -> str:
    """What a job is doing, in a few words.

    Args:
        content: A record's.
    """
    words = [str(content["stage"])]
    progress = content.get("progress")
    if progress:
        for one, all_of_them in (("epoch", "epochs"), ("step", "steps")):
            if one == "epoch" or progress[all_of_them] is not None:
                total = "" if progress[all_of_them] is None else f" of {progress[all_of_them]}"
                words.append(f"{one} {progress[one]}{total}")
        if progress["loss"] is not None:
            words.append(f"loss {progress['loss']:.4g}")
        if progress["seconds_left"] is not None:
            words.append(f"{_duration(progress['seconds_left'])} left")
    return ", ".join(words)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _watch(
    process: "subprocess.Popen[bytes]",
    record: Record,
    time_limit: float | None,
    teller: _Teller,
) -> bool:
    """Wait for a process; whether it ended in time."""
    end = math.inf if time_limit is None else time.monotonic() + time_limit
    while process.poll() is None:
        left = end - time.monotonic()
        if left <= 0:
            return False
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left, POLL_SECONDS))
        record.read()
        teller(record.content)
    return True


def _note_time_out(record: Record, time_limit: float | None) -> None:
    """Write down where the time was over; a runtime that took it all is not tried again by itself."""
    stage = record.content["stage"]
    reason = f"ran out of time: {time_limit:g} s were over in the stage {stage!r}"
    if stage in RUNTIMES:
        figures = {**conditions(stage, record.content["measuring"]), "reason": reason}
        record.content["runtimes"] = {**record.content.get("runtimes", {}), stage: figures}
    record.save(status="timed out", reason=reason)


def _fate(code: int, record: Record, last_words: str) -> str:
    fate = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -9 else ""  # SIGKILL
    return f"the process {fate}{hint} in the stage {record.content['stage']!r}; it said last: {last_words}"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)  # workers of data loaders included
    process.wait()
