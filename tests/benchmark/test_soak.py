# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pandas as pd
import pytest
import soak
from anomalib.data import Folder
from conftest import one_program
from PIL import Image


@pytest.mark.slow
def test_two_rounds(
    tmp_path: Path,
    tiles: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(soak, "SurfaceDefects", lambda *_args, **_options: tiles)
    monkeypatch.setattr(soak, "MODELS", ["FractalMemory"])
    first = soak._use

    def use_once(*arguments: object) -> None:  # exporting takes its time
        monkeypatch.setattr(soak, "_use", print)
        with one_program():
            first(*arguments)

    monkeypatch.setattr(soak, "_use", use_once)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "0")
    monkeypatch.chdir(tmp_path)
    soak.soak(minutes=0, output=Path("soak"), backbone="test_resnet", image_size=64, num_workers=0)
    rows = pd.read_csv("soak/soak.csv")
    assert list(rows["round"]) == [1, 2]
    assert (rows["memory_mib"] > 100).all()
    assert (rows["open_files"] >= 3).all()
    assert (rows["threads"] >= 1).all()
    assert Image.open("soak/soak.png").width > 500
    assert [path.name for path in tmp_path.iterdir()] == ["soak"]
    assert os.environ["TRUST_REMOTE_CODE"] == "0"
    assert "2 rounds" in capsys.readouterr().out


def rows(memory: list[float], files: list[int]) -> list[soak.Row]:
    still = {"threads": 8, "child_processes": 0}
    return [
        {"round": i + 1, "minutes": i, "memory_mib": mib, "open_files": count, **still}
        for i, (mib, count) in enumerate(zip(memory, files, strict=True))
    ]


@pytest.mark.parametrize(
    ("memory", "files", "growing"),
    [
        ([500, 900, 990, 1010, 1000, 1000, 1010, 990], [6] * 8, []),
        ([500, 600, 700, 800, 900, 1000, 1100, 1200], [6] * 8, ["memory_mib"]),
        ([1000] * 8, [6, 6, 6, 6, 7, 6, 7, 6], []),
        ([1000] * 8, [6, 7, 8, 9, 10, 11, 12, 13], ["open_files"]),
    ],
)
def test_the_verdict_names_what_grows(
    memory: list[float],
    files: list[int],
    growing: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert soak.verdict(rows(memory, files)) == (not growing)
    printed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in printed if "GROWS" in line} == set(growing)
