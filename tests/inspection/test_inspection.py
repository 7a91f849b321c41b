# SPDX-License-Identifier: Apache-2.0
"""The inspection by itself, without a network."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from anomalib_fractalad.inspection import command, draw_heat_map, find_defects, find_images, inspect_main

Row = dict[str, Any]


@pytest.mark.parametrize("density", [0.02, 0.3, 0.55, 1.0])
def test_defects_are_connected_parts(density: float) -> None:
    for seed in range(5):
        mask = np.random.default_rng(seed).random((40, 50)) < density
        found = find_defects(mask, (50, 40))
        count, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        expected = sorted([x, y, x + w, y + h, area] for x, y, w, h, area in statistics[1:].tolist())
        assert len(found) == count - 1
        assert sorted([*defect["box"], defect["area"]] for defect in found) == expected
        assert [d["area"] for d in found] == sorted((d["area"] for d in found), reverse=True)
    assert find_defects(np.zeros((4, 4)), (4, 4)) == []


def test_defects_are_told_in_pixels_of_the_original() -> None:
    mask = np.zeros((64, 64), dtype=bool)
    mask[16:32, 8:16] = True
    (large,) = find_defects(mask, (640, 320))
    assert large == {"box": [80, 80, 160, 160], "area": 80 * 80}
    (small,) = find_defects(mask, (10, 10))  # of 1.25 x 2.5 pixels
    assert small == {"box": [1, 2, 3, 5], "area": 3}


def test_heat_maps_show_nothing_where_maps_are_low() -> None:
    image = Image.fromarray(np.full((40, 80, 3), 100, dtype=np.uint8))
    values = np.zeros((4, 8), dtype=np.float32)
    values[:, 6:] = 1
    drawn = np.asarray(draw_heat_map(image, values, [{"box": [0, 0, 20, 10], "area": 200}])).astype(int)
    assert (drawn[20:, :40] == 100).all()
    assert (drawn[:, 75, 0] > drawn[:, 75, 1] + 100).all()
    assert (drawn[0, :20] == [255, 0, 0]).all()


class FakeInspector:
    """Calls images by their first letter: good, anomalous or, as anything else, unreadable."""

    def __init__(self, part: Path, device: str, threshold: float | None) -> None:
        if not Path(part).is_dir():
            msg = "this is no part folder"
            raise FileNotFoundError(msg)
        self.arguments = (device, threshold)

    def inspect(self, path: Path, heat_map: Path | None = None) -> Row:
        decision = {"g": "good", "a": "anomalous"}.get(path.read_text()[:1] if path.is_file() else "", "unreadable")
        if heat_map is not None:
            heat_map.parent.mkdir(parents=True, exist_ok=True)
            assert not heat_map.exists()
            heat_map.write_text(str(path))
        error = "broken" if decision == "unreadable" else None
        values = (str(path), 0.5, decision, [{"box": [1, 2, 3, 4], "area": 5}], 1.0, error)
        return dict(zip(command.FIELDS, values, strict=True))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(command, "Inspector", FakeInspector)
    images = tmp_path / "images"
    for name in ("part.png", "part.jpg", "left/part.png", "Right/ü 部品.TIF"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_text("good")
    for name in ("Thumbs.db", ".DS_Store", "._part.png", "left/notes.txt", ".trash/part.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_text("none")
    return images


def run(*arguments: object) -> int:
    return inspect_main([str(argument) for argument in arguments])


def test_lines_heat_maps_and_exit_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part, maps, lines = folder.parent, folder / "maps", folder.parent / "out" / "lines.csv"
    assert run(part, folder, "--heat-maps", maps, "--output", lines) == 0
    with lines.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["image"]).relative_to(folder).as_posix() for row in rows} == {
        "part.png",
        "part.jpg",
        "left/part.png",
        "Right/ü 部品.TIF",
    }
    assert json.loads(rows[0]["defects"]) == [{"box": [1, 2, 3, 4], "area": 5}]
    drawn = [path for path in maps.rglob("*") if path.is_file()]
    assert sorted(path.read_text() for path in drawn) == sorted(row["image"] for row in rows)
    assert "4 good, 0 anomalous, 0 unreadable" in capsys.readouterr().err
    assert len(find_images([folder], [maps])) == 4
    (folder / "part.jpg").write_text("anomalous")
    assert run(part, folder / "part.jpg", folder / "left", "--format", "json") == 1
    output = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["decision"] for row in output] == ["anomalous", "good"]
    (folder / "part.png").write_text("broken")
    assert run(part, folder / "part.png", folder / "part.jpg", folder / "left/part.png") == 2
    assert len(capsys.readouterr().out.splitlines()) == 4  # with the header: the broken one stops nothing


def test_wrong_calls_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    (folder.parent / "old.csv").write_text("image,score,decision,defects,milliseconds,error\n")
    for arguments, message in (
        ((folder / "missing", folder), "no part folder"),
        ((folder, folder / "missing"), "missing does not exist"),
        ((folder, folder / "part.png", "--watch"), "--watch takes folders"),
        ((folder, folder / "left", "--heat-maps", folder), "lies in the folder of the heat maps"),
        ((folder, folder, "--idle", "3"), "--idle needs --watch"),
        ((folder, folder, "--watch", "--idle", "nan"), "--idle is nan"),
        ((folder, folder, "--threshold", "7"), "--threshold is 7.0; scores lie between 0 and 1"),
        ((folder, folder, "--output", folder), "--output: "),
        ((folder, folder, "--output", folder / "part.png"), "part.png has an image's ending: give another file"),
        ((folder, folder, "--output", folder / "left/notes.txt"), "notes.txt exists and holds no results of this"),
        (
            (folder, folder, "--watch", "--format", "json", "--output", folder.parent / "old.csv"),
            "old.csv holds csv: give --format csv, or another file",
        ),
        ((folder, folder, "--heat-maps", folder.parent / "old.csv"), "--heat-maps: "),
        ((), "the following arguments are required"),
    ):
        with pytest.raises(SystemExit) as error:
            run(*arguments)
        assert error.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert (folder / "part.png").read_text() == "good"
    assert run(folder, folder / "empty", "--output", folder.parent / "old.csv") == 2
    assert "error: there is no image in " in capsys.readouterr().err
    assert (folder.parent / "old.csv").stat().st_size  # nothing takes its place


def test_results_take_the_place_of_older_ones(folder: Path, tmp_path: Path) -> None:
    for kind in ("csv", "json", "csv"):
        assert run(tmp_path, folder, "--format", kind, "--output", tmp_path / "lines.csv") == 0
    with (tmp_path / "lines.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_stopped_while_it_loads_the_part_it_says_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "Inspector", stop)
    assert run(folder, folder) == 130
    assert capsys.readouterr() == ("", "")


class Clock:
    """Time that passes only while somebody sleeps, with things that happen meanwhile."""

    def __init__(self, *happenings: tuple[float, Callable[[], object]]) -> None:
        self.now, self.happenings = 0.0, list(happenings)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.happenings and self.happenings[0][0] <= self.now:
            self.happenings.pop(0)[1]()


def watched(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, *more: object) -> list[tuple[str, str]]:
    monkeypatch.setattr(command, "time", clock)
    lines = folder.parent / "lines.json"
    run(folder.parent, folder, "--watch", "--format", "json", "--output", lines, "--interval", 1, *more)
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return [(Path(row["image"]).name, row["decision"]) for row in rows]


def test_watching_takes_each_image_once_it_is_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, broken, again = folder / "slow.png", folder / "broken.png", folder / "part.jpg"
    clock = Clock(
        (3, lambda: slow.write_text("x")),
        (5, lambda: slow.write_text("xx")),
        (8, lambda: slow.write_text("anomalous")),
        (12, lambda: broken.write_text("x")),
        (13, lambda: (folder / "late.png").write_text("good")),
        (30, lambda: again.write_text("anomalous, and new")),
    )
    rows = watched(folder, clock, monkeypatch, "--idle", 20, "--grace", 6)
    assert set(rows[:4]) == {("part.png", "good"), ("part.jpg", "good"), ("ü 部品.TIF", "good")}
    assert rows[4:] == [
        ("slow.png", "anomalous"),
        ("late.png", "good"),
        ("broken.png", "unreadable"),
        ("part.jpg", "anomalous"),
    ]
    assert not clock.happenings
    assert clock.now < 60
    # A second call goes on with the same file.
    assert len(watched(folder, Clock(), monkeypatch, "--idle", 20, "--grace", 0)) == len(rows) + 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_ends_with_a_signal(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    rows = watched(folder, Clock((5, lambda: signal.getsignal(number)(number, None))), monkeypatch)
    assert len(rows) == 4
    assert signal.getsignal(signal.SIGTERM) == before
