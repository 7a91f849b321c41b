# SPDX-License-Identifier: Apache-2.0
"""SurfaceDefects: a small inspection data set that is made on the spot instead of downloaded."""

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from anomalib.data.datamodules.base import AnomalibDataModule
from anomalib.data.datasets.image.mvtecad import MVTecADDataset
from anomalib.data.utils import Split, TestSplitMode, ValSplitMode
from anomalib.utils.path import resolve_dataset_root
from filelock import FileLock
from PIL import Image
from torchvision.transforms.v2 import Transform

from anomalib_fractalad.data._painters import PAINTERS, paint

logger = logging.getLogger(__name__)

CATEGORIES = tuple(PAINTERS)
_FORMER = {"moulded_part": "molded_part"}
_MANIFEST = "surface_defects.json"
_EDITION = 1
"""Raised whenever the images change, so that folders of an older edition are written anew."""
_TRAIN_GOOD, _TEST_GOOD, _PER_DEFECT = 60, 20, 10


class _Shot(NamedTuple):
    """One image: its files below the category's folder and what ``paint`` needs to make it again."""

    image: str
    mask: str | None
    seed: tuple[int, int]
    defect: str | None = None
    severity: float = 0.0

    @property
    def files(self) -> list[str]:
        return [self.image] if self.mask is None else [self.image, self.mask]


def _shots(category: str) -> list[_Shot]:
    shots = [_Shot(f"train/good/{i:03}.png", None, (0, i)) for i in range(_TRAIN_GOOD)]
    shots += [_Shot(f"test/good/{i:03}.png", None, (1, i)) for i in range(_TEST_GOOD)]
    for group, defect in enumerate(PAINTERS[category].DEFECTS, start=2):
        for i in range(_PER_DEFECT):
            severity = 0.15 + 0.85 * i / max(_PER_DEFECT - 1, 1)
            mask = f"ground_truth/{defect}/{i:03}_mask.png"
            shots.append(_Shot(f"test/{defect}/{i:03}.png", mask, (group, i), defect, severity))
    return shots


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, as the manifest has it; empty where the folder is yet to be written or written anew.

    Raises:
        FileExistsError: The folder holds files but no manifest of ours.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        return dict(manifest["files"]) if manifest["edition"] == _EDITION else {}
    except FileNotFoundError:
        if folder.is_dir() and any(folder.iterdir()):
            msg = (
                f"{folder.resolve()} holds files that SurfaceDefects did not write (there is no {_MANIFEST}). "
                "Choose another root, or delete the folder."
            )
            raise FileExistsError(msg) from None
    except (ValueError, TypeError, KeyError):
        logger.warning("%s is damaged.", folder / _MANIFEST)
    return {}


def _faulty(folder: Path, category: str, digests: dict[str, str]) -> list[_Shot]:
    """Shots of which a file is missing or not as it was written."""

    def intact(name: str) -> bool:
        path = folder / name
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digests.get(name)

    return [shot for shot in _shots(category) if not all(map(intact, shot.files))]


def _write(folder: Path, category: str, shots: Iterable[_Shot]) -> dict[str, str]:
    """Write the shots' files below ``folder`` and return their digests."""

    def shoot(shot: _Shot) -> dict[str, str]:
        sample = paint(category, shot.seed, shot.defect, shot.severity)
        digests = {}
        for name, pixels in zip(shot.files, (sample.image, sample.mask), strict=False):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(png.getvalue())
            digests[name] = hashlib.sha256(png.getvalue()).hexdigest()
        return digests

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        return {name: digest for digests in pool.map(shoot, shots) for name, digest in digests.items()}


def _prepare(root: Path, category: str) -> None:
    """Write what is missing of a category; files appear under their names only when they are complete."""
    folder, part = root / category, root / f".{category}.part"
    if not _faulty(folder, category, _digests(folder)):
        return
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{category}.lock"):
        digests = _digests(folder)
        shots = _faulty(folder, category, digests)
        if not shots:
            return
        if digests:
            logger.warning("Restoring in %s: %s", folder, ", ".join(shot.image for shot in shots))
        else:
            logger.info("Writing the data set %s", folder)
        shutil.rmtree(part, ignore_errors=True)
        digests |= _write(part, category, shots)
        (part / _MANIFEST).write_text(json.dumps({"edition": _EDITION, "files": digests}, indent=1), encoding="utf-8")
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if not folder.exists():
            part.rename(folder)
            return
        for name in [name for shot in shots for name in shot.files] + [_MANIFEST]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).replace(folder / name)
        shutil.rmtree(part)


class SurfaceDefects(AnomalibDataModule):
    """A small inspection data set in MVTec AD's layout, written on first use; nothing is downloaded.

    Each category has 60 normal training, 20 normal and 40 defective test images: 256x256 RGB PNG files, with masks
    (0 or 255) of the pixels that the defect visibly changes. The images are rendered, the same on every run:

    - ``fabric``: woven cloth; contamination, cut, missing thread, stain.
    - ``metal_plate``: brushed steel; contamination, dent, scratch, stain.
    - ``molded_part``: a plastic gear; broken tooth, contamination, scratch, stain.

    Files that are missing or damaged are restored whenever the data is prepared. A folder of the category's name that
    this class did not write is never touched.

    Args:
        root: Folder that holds one folder for each category; None for anomalib's cache of data sets.
        category: One of the categories above.
        train_batch_size: Training batch size.
        eval_batch_size: Validation, test and prediction batch size.
        num_workers: Worker processes of each data loader. Reading these files takes less time than starting workers.
        train_augmentations: Augmentations of the training images.
        val_augmentations: Augmentations of the validation images.
        test_augmentations: Augmentations of the test images.
        augmentations: Augmentations where none are given for the stage.
        test_split_mode: How the test set is made.
        test_split_ratio: Share of images for testing, where the mode splits.
        val_split_mode: How the validation set is made.
        val_split_ratio: Share of images for validation, where the mode splits.
        seed: Seed of the splits.

    Raises:
        ValueError: The category is unknown.
        FileExistsError: On preparation, where the category's folder holds other data.
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/SurfaceDefects",
        category: str = "fabric",
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        if category in _FORMER:
            logger.warning("The category %s of SurfaceDefects is called %s now.", category, _FORMER[category])
            category = _FORMER[category]
        if category not in CATEGORIES:
            msg = f"SurfaceDefects has no category {category!r}; choose one of: {', '.join(CATEGORIES)}."
            raise ValueError(msg)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.root = resolve_dataset_root(root, "SurfaceDefects")
        self.category = category

    def prepare_data(self) -> None:
        """Write the category's files, or restore those that are missing or damaged."""
        _prepare(self.root, self.category)

    def _setup(self, _stage: str | None = None) -> None:
        self.prepare_data()
        self.train_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TRAIN)
        self.test_data = MVTecADDataset(root=self.root, category=self.category, split=Split.TEST)
