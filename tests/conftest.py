# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from PIL import Image

SIZE = 64

torch.set_num_threads(1)  # the tests' networks are tiny: threads cost more than they gain


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tile_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in MVTec's layout: plates with fine stripes, and dark blots as defects."""
    root = tmp_path_factory.mktemp("tiles")
    random = np.random.default_rng(0)
    for folder, count, defective in (("train/good", 8, False), ("test/good", 4, False), ("test/blot", 4, True)):
        for i in range(count):
            image = 120 + 40 * np.sin(np.arange(SIZE) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (SIZE, SIZE))
            mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
            if defective:
                row, column = random.integers(8, SIZE - 24, size=2)
                mask[row : row + 16, column : column + 16] = 255
                image = np.where(mask > 0, 20, image)
            save(image, root / folder / f"{i:03}.png")
            if defective:
                save(mask, root / "ground_truth/blot" / f"{i:03}.png")
    return root


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def tiles(tile_root: Path) -> Folder:
    return make_tiles(tile_root)


def make_tiles(root: Path, num_workers: int = 0) -> Folder:
    return Folder(
        name="tiles",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/blot",
        mask_dir="ground_truth/blot",
        train_batch_size=4,
        eval_batch_size=4,
        num_workers=num_workers,
        val_split_mode="same_as_test",
    )
