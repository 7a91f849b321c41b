# SPDX-License-Identifier: Apache-2.0
"""Which candidates a build tries, for the time that it has."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anomalib_fractalad.build import choose
from anomalib_fractalad.build.state import Progress, State

NAMES = {"first": None, "long": 100, "longer": 200, "quick": None}


def tried(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    effort: float | None = None,
    tick: float = 0.0,
    names: dict[str, int | None] = NAMES,
    before: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What trying finds out; a step takes a second, an image a tenth, and a look at the clock ``tick``."""

    def build(name: str) -> str:
        if name == "broken":
            raise ValueError(name)
        return name

    candidates: list[Any] = [
        SimpleNamespace(name=name, image_size=(64, 64), steps=steps, batch_size=4, build=lambda name=name: build(name))
        for name, steps in {**names, "broken": 50}.items()
    ]
    clock = itertools.count(0, tick)
    monkeypatch.setattr(choose, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(choose, "gflop", lambda *_: 1.0)
    monkeypatch.setattr(choose, "seconds_per_image", lambda *_: 0.1)
    monkeypatch.setattr(choose, "seconds_per_step", lambda *_: 1.0)
    monkeypatch.setattr(choose, "data_module", lambda *_, **__: None)
    setting = choose.Setting([Path("image.png")] * 10, (), folder, seconds, effort)
    table: dict[str, Any] = {"rows": before or {}}
    running = choose._Choice(candidates, setting, State(folder / "state.json"), Progress(None), table)
    alive = [candidate.name for candidate in running.try_out()]
    rows = table["rows"]
    in_order = [name for name in ("first", "quick", "long", "longer") if name in names]
    assert alive == [name for name in in_order if not rows[name].keys() & {"note", "failed"}]
    assert list(rows) == [*in_order, "broken"]
    assert "ValueError" in rows["broken"]["failed"]
    return {name: row.get("seconds", row.get("note")) for name, row in rows.items() if name != "broken"}


def test_with_time_all_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {"first": 1.0, "quick": 1.0, "long": 100.0, "longer": 200.0}
    assert tried(tmp_path / "time", monkeypatch, 3000) == everything
    none = dict.fromkeys(everything, 0.0)
    assert tried(tmp_path / "effort", monkeypatch, 1, effort=1.0, tick=100) == none


def test_none_is_tried_after_one_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"first": 1.0, "quick": 1.0, "long": 100.0, "longer": choose.NO_TIME}
    assert tried(tmp_path, monkeypatch, 20) == expected


def test_trying_takes_a_tenth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"first": 1.0, "quick": 1.0, "long": 100.0, "longer": choose.NO_TIME}
    assert tried(tmp_path / "some", monkeypatch, 3000, tick=200) == expected
    assert tried(tmp_path / "none", monkeypatch, 3000, tick=400) == expected | {"long": choose.NO_TIME}


def test_candidates_that_all_train_step_by_step_are_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"first": 50, "long": 100, "longer": 200}
    assert tried(tmp_path / "time", monkeypatch, 3000, names=names) == {"first": 50.0, "long": 100.0, "longer": 200.0}
    expected = {"first": 50.0, "long": choose.NO_TIME, "longer": choose.NO_TIME}
    assert tried(tmp_path / "none", monkeypatch, 5, names=names) == expected


def test_what_failed_in_an_earlier_call_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"first": {"seconds": 1.0}, "quick": {"seconds": 1.0, "failed": "RuntimeError"}}
    assert tried(tmp_path, monkeypatch, 3000, before=failed) == {
        "first": 1.0,
        "quick": 1.0,
        "long": 100.0,
        "longer": 200.0,
    }
