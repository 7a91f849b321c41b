# SPDX-License-Identifier: Apache-2.0
"""Two calls of a comparison on one output."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from anomalib_fractalad.benchmark import __main__ as command
from anomalib_fractalad.benchmark.config import Job, Settings, make_jobs
from anomalib_fractalad.benchmark.record import Record, record_of

SECONDS = 60  # until a test gives up


@pytest.mark.parametrize("other_ends", [True, False])
def test_calls_on_one_output_share_its_jobs(
    other_ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = make_jobs([{"class_path": "Padim"}], [{"class_path": "SurfaceDefects"}], (0, 1, 2), Settings())
    done: list[Job] = []

    def run(job: Job, record: Record, *_: Any) -> None:
        end(record)
        done.append(job)

    monkeypatch.setattr(command, "run_in_process", run)
    call = threading.Thread(target=command._run, args=(jobs, tmp_path, None, False))
    others = record_of(jobs[0], tmp_path)
    with others.lock:
        call.start()
        deadline = time.monotonic() + SECONDS
        while len(done) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert done == jobs[1:]  # the first waits
        assert call.is_alive()
        if other_ends:
            end(others)
    call.join(SECONDS)
    assert not call.is_alive()
    assert done == (jobs[1:] if other_ends else [*jobs[1:], jobs[0]])
    assert "waiting for another call" in capsys.readouterr().err


def end(record: Record) -> None:
    record.save(status="failed", reason="nothing was to be done")
