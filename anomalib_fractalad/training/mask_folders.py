# SPDX-License-Identifier: Apache-2.0
"""Naming the masks that a data module would miss without saying which."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_fractalad.image_files import UnreadableImageError

_SHOWN = 10


def check_mask_folders(datamodule: Any) -> None:
    """Refuse folders of anomalous images that have fewer or more masks than images.

    anomalib pairs images and masks in order, and fails on their number before it knows their names.

    Args:
        datamodule: One of anomalib's that read a folder, or one in MVTec's layout, before it is set up; any other is
            passed over.

    Raises:
        UnreadableImageError: If an image lacks its mask or a mask its image.
    """
    problems = []
    for image_folders, mask_folders in _pairs(datamodule):
        images, masks = list(_images_in(image_folders)), list(_images_in(mask_folders))
        if len(images) == len(masks) or not masks:
            continue
        for image in list(images):
            mask = next((mask for mask in masks if image.stem in mask.stem), None)
            if mask is None:
                problems.append(f"{image} is anomalous and has no mask in {_names(mask_folders)}.")
            else:
                masks.remove(mask)
        problems.extend(f"{mask} is a mask without an image in {_names(image_folders)}." for mask in masks)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        msg = "\n  ".join(["images and masks do not match:", *problems[:_SHOWN], *more])
        raise UnreadableImageError(msg)


def _pairs(datamodule: Any) -> Iterator[tuple[list[Path], list[Path]]]:
    """Folders of anomalous images, and those of their masks."""
    root = Path(getattr(datamodule, "root", None) or "")
    anomalous, masks = (_folders(getattr(datamodule, name, None), root) for name in ("abnormal_dir", "mask_dir"))
    if anomalous and masks:
        pairs = zip(anomalous, masks, strict=False)
        yield from (([one], [other]) for one, other in pairs) if len(anomalous) == len(masks) else [(anomalous, masks)]
    elif not hasattr(datamodule, "mask_dir"):
        category = root / str(getattr(datamodule, "category", None) or "")
        for folder in sorted((category / "ground_truth").glob("*/")):
            yield [category / "test" / folder.name], [folder]


def _folders(given: Any, root: Path) -> list[Path]:
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    return [root / folder for folder in several if folder is not None]


def _images_in(folders: list[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(path for path in folder.glob("*") if path.suffix.lower() in IMG_EXTENSIONS)


def _names(folders: list[Path]) -> str:
    return ", ".join(map(str, folders))
