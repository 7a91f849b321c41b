# SPDX-License-Identifier: Apache-2.0
"""Finding images that cannot be read before work is lost."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

from PIL import Image

from anomalib_fractalad.image_files import UnreadablePictureError, open_rgb, read_mask

_SHOWN = 10  # files named in an error
_THREADS = 8


def check_pictures(datasets: Iterable[Any]) -> None:
    """Read all pictures and masks once.

    Args:
        datasets: Anomalib's data sets of images; others are passed over.

    Raises:
        UnreadablePictureError: If some cannot be read, or a mask has other proportions than its image; the message
            names the files and what is wrong with each.
    """
    problems = _problems((item for dataset in datasets for item in _items(dataset)), _unusable)
    if problems:
        raise _error(problems)


def leave_out_unreadable(datasets: Sequence[Any]) -> list[str]:
    """Take the pictures that cannot be read out of data sets, in place.

    Args:
        datasets: Anomalib's data sets of images; others are passed over.

    Returns:
        What is wrong with each of the pictures left out.

    Raises:
        UnreadablePictureError: If nothing would be left.
    """
    items = [list(_items(dataset)) for dataset in datasets]
    problems = _problems(chain(*items), _unreadable)
    if problems and problems.keys() == set(chain(*items)):
        raise _error(problems)
    if problems:
        for dataset, candidates in zip(datasets, items, strict=True):
            kept = [index for index, item in enumerate(candidates) if item not in problems]
            if hasattr(dataset, "image_filenames"):
                dataset.image_filenames = [dataset.image_filenames[index] for index in kept]
            elif candidates:
                dataset.subsample(kept, inplace=True)
    return list(problems.values())


_Item = tuple[str, ...]  # an image and its masks


def _items(dataset: Any) -> Iterator[_Item]:
    from anomalib import TaskType  # noqa: PLC0415
    from anomalib.data import AnomalibDataset, PredictDataset  # noqa: PLC0415
    from anomalib.data.datasets.base import AnomalibVideoDataset  # noqa: PLC0415
    from anomalib.data.utils import LabelName  # noqa: PLC0415

    if isinstance(dataset, PredictDataset):
        yield from ((str(path),) for path in dataset.image_filenames)
    elif isinstance(dataset, AnomalibDataset) and not isinstance(dataset, AnomalibVideoDataset):
        for sample in dataset.samples.itertuples():
            masked = dataset.task == TaskType.SEGMENTATION and sample.label_index == LabelName.ABNORMAL
            masks = sample.mask_path if masked else []
            yield (sample.image_path, *([masks] if isinstance(masks, str) else masks))


def _problems(items: Iterable[_Item], problem: Callable[[_Item], str]) -> dict[_Item, str]:
    items = list(dict.fromkeys(items))
    with ThreadPoolExecutor(_THREADS) as pool:
        return {item: found for item, found in zip(items, pool.map(problem, items), strict=True) if found}


def _error(problems: dict[_Item, str]) -> UnreadablePictureError:
    shown = list(problems.values())[:_SHOWN]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return UnreadablePictureError("\n  ".join([f"{len(problems)} picture(s) cannot be used:", *shown, *more]))


def _unreadable(item: _Item) -> str:
    image, *masks = item
    try:
        open_rgb(image)
        for mask in masks:
            read_mask(mask)
    except OSError as error:
        return str(error)
    return ""


def _unusable(item: _Item) -> str:
    image, *masks = item
    problem = _unreadable(item)
    if problem or not masks:
        return problem
    width, height = _size(image)
    for mask in masks:
        mask_width, mask_height = _size(mask)
        if abs(mask_width * height - mask_height * width) > max(width, height):  # more than a pixel of the mask
            return (
                f"{mask} is a mask of {mask_width}x{mask_height} pixels for an image of {width}x{height}, {image}. "
                "It has to have the image's proportions."
            )
    return ""


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
