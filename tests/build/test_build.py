# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import save

from anomalib_fractalad.build import build_part
from anomalib_fractalad.build.state import Progress

CANDIDATES = """
- name: fine
  model: {class_path: FractalAD, init_args: {distillation: false, learning_rate: 0.004}}
  steps: 24
  batch_size: 4
  size: 64
  scores: [top, max]
  trains_on: [fractal, faint fractal]
- name: broken
  model: {class_path: FractalAD, init_args: {backbone: no_such_backbone}}
  steps: 24
- name: with a student
  model: {class_path: FractalAD, init_args: {position_margin: 0.0}}
  steps: 24
  batch_size: 4
  size: 64
  scores: [top, mean]
"""


def make_folder(root: Path, good: int = 48, bad: int = 4) -> Path:
    """Plates with fine stripes as people have them: with files that are no images, and some that cannot be read."""
    random = np.random.default_rng(0)
    for folder, count in (("good", good), ("bad/blot", bad)):
        for index in range(count):
            image = 120 + 40 * np.sin(np.arange(64) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (64, 64))
            if folder != "good":
                row, column = random.integers(8, 40, size=2)
                image[row : row + 14, column : column + 14] = 20
            save(image, root / folder / f"{index:03}.png")
    for name in ("Thumbs.db", ".DS_Store", "._000.png"):
        (root / "good" / name).write_bytes(b"no image")
    (root / "good" / "broken.png").write_bytes(b"no image")
    (root / "candidates.yaml").write_text(CANDIDATES)
    return root


def options(root: Path, **others: Any) -> dict[str, Any]:
    """Options of a small build."""
    small = {"backbone": "test_resnet", "pre_trained": False, "accelerator": "cpu", "effort": 1.0}
    return {**small, "bad": root / "bad", "candidates": root / "candidates.yaml", **others}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A part that was built, and what was told meanwhile."""
    root = make_folder(tmp_path_factory.mktemp("part"))
    told: list[str] = []

    class Told(Progress):
        def line(self, text: str) -> None:
            told.append(text)

    report = build_part(root / "good", root / "part1", **options(root), progress=Told(None))
    return SimpleNamespace(root=root, part=root / "part1", report=report, told=told)
