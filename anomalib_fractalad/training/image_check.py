# SPDX-License-Identifier: Apache-2.0
"""Finding images that cannot be read, and masks that cannot be right, before work is lost."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Semaphore
from typing import Any, Literal, NamedTuple, get_args

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tqdm import tqdm

from anomalib_fractalad.image_files import UnreadableImageError, check_image, is_blank

from .loaders import current_loaders, datasets_of

logger = logging.getLogger(__name__)

Mode = Literal["auto", "full", "headers", "off"]
MODE_VARIABLE = "ANOMALIB_FRACTALAD_IMAGE_CHECK"
_SHOWN = 10  # files named in an error
_THREADS = 8
_MANY = 1000  # images from which on progress is shown
_LARGE = 4_000_000  # pixels of an image that is decoded alone
_AUTO_PIXELS = 100_000_000  # of a set of images that is decoded as a whole: some seconds


class ImageCheck(Callback):
    """Checks images and masks before a training or a test, and leaves unreadable images out of a prediction.

    A mask is refused where it marks nothing, is missing while others are there, or has other proportions than its
    image. In several processes the first one checks for all. Files of the same size and time are not checked again,
    neither by this object nor by a training that is resumed.

    Args:
        mode: ``full`` decodes every image. ``headers`` reads the beginning and the end of each, and decodes masks.
            ``auto`` decodes the images of a training up to 100 million pixels, spread evenly over the set,
            and reads the headers of the rest and of images to validate and test on alone. ``off`` checks nothing. Left
            out, it is the environment variable ANOMALIB_FRACTALAD_IMAGE_CHECK, or ``auto``.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(self, mode: Mode | None = None) -> None:
        chosen = mode or os.environ.get(MODE_VARIABLE) or "auto"
        if chosen not in get_args(Mode):
            msg = f"the check of images is {chosen!r}; use one of {', '.join(get_args(Mode))}"
            raise ValueError(msg)
        self.mode: Mode = chosen  # type: ignore[assignment]
        self._checked: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to train, validate and test on.

        Raises:
            UnreadableImageError: If some cannot be used.
        """
        del pl_module
        test_data = getattr(getattr(trainer, "datamodule", None), "test_data", None)
        self._check(trainer, [*datasets_of(current_loaders(trainer)), test_data])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to validate on, where this is no part of a training; raises as for a training."""
        del pl_module
        if trainer.state.fn == "validate":
            self._check(trainer, datasets_of(current_loaders(trainer)))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images to test on; raises as for a training."""
        del pl_module
        self._check(trainer, datasets_of(current_loaders(trainer)))

    def _check(self, trainer: Trainer, datasets: Sequence[Any]) -> None:
        message: str | None = None
        if self.mode != "off" and trainer.is_global_zero:
            mode: Mode = "headers" if self.mode == "auto" and trainer.state.fn != "fit" else self.mode
            items = {_fingerprint(item): item for dataset in datasets for item in _items(dataset)}
            found = _problems([item for key, item in items.items() if key not in self._checked], mode)
            message = _message(found) if found else None
            self._checked.update(items)
        if message := trainer.strategy.broadcast(message):
            self._checked.clear()
            raise UnreadableImageError(message)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out images that cannot be read, and say which, so that the others are predicted.

        Raises:
            UnreadableImageError: If none can be read.
        """
        del pl_module
        if self.mode == "off" or not (left_out := leave_out_unreadable(datasets_of(current_loaders(trainer)))):
            return
        if trainer.is_global_zero:
            logger.warning("\n  ".join([f"{len(left_out)} image(s) left out of the prediction:", *left_out]))
        loop = trainer.predict_loop  # its samplers and workers still have the longer lists
        loop.setup_data()
        loop.reset()

    def state_dict(self) -> dict[str, Any]:
        """What has been checked."""
        return {"checked": sorted(self._checked)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what has been checked."""
        self._checked.update(state_dict["checked"])


def check_images(datasets: Iterable[Any], mode: Mode = "full") -> None:
    """Check images and masks of data sets once.

    Args:
        datasets: Anomalib's data sets of images; others are passed over.
        mode: As for :class:`ImageCheck`.

    Raises:
        UnreadableImageError: If some cannot be read, or a mask marks nothing, is missing or has other proportions
            than its image; the message names the files and what is wrong with each.
    """
    problems = _problems([item for dataset in datasets for item in _items(dataset)], mode)
    if problems:
        raise UnreadableImageError(_message(problems))


def leave_out_unreadable(datasets: Sequence[Any]) -> list[str]:
    """Take the images that cannot be read out of data sets, in place.

    Args:
        datasets: Anomalib's data sets of images; others are passed over.

    Returns:
        What is wrong with each of the images left out.

    Raises:
        UnreadableImageError: If nothing would be left.
    """
    items = [list(_items(dataset)) for dataset in datasets]
    problems = _run(chain(*items), _unreadable)
    if problems and problems.keys() == set(chain(*items)):
        raise UnreadableImageError(_message(problems))
    if problems:
        for dataset, candidates in zip(datasets, items, strict=True):
            kept = [index for index, item in enumerate(candidates) if item not in problems]
            if hasattr(dataset, "image_filenames"):
                dataset.image_filenames = [dataset.image_filenames[index] for index in kept]
            elif candidates:
                dataset.subsample(kept, inplace=True)
    return list(problems.values())


class _Item(NamedTuple):
    image: str
    masks: tuple[str, ...] = ()
    needs_mask: bool = False


def _items(dataset: Any) -> Iterator[_Item]:
    from anomalib import TaskType  # noqa: PLC0415
    from anomalib.data import AnomalibDataset, PredictDataset  # noqa: PLC0415
    from anomalib.data.datasets.base import AnomalibVideoDataset  # noqa: PLC0415
    from anomalib.data.utils import LabelName  # noqa: PLC0415

    if isinstance(dataset, PredictDataset):
        yield from (_Item(str(path)) for path in dataset.image_filenames)
    elif isinstance(dataset, AnomalibDataset) and not isinstance(dataset, AnomalibVideoDataset):
        masked = dataset.task == TaskType.SEGMENTATION
        for sample in dataset.samples.itertuples():
            needs_mask = masked and sample.label_index == LabelName.ABNORMAL
            masks = sample.mask_path if needs_mask else []
            masks = [masks] if isinstance(masks, str) else masks if isinstance(masks, list | tuple) else []
            yield _Item(str(sample.image_path), tuple(filter(None, masks)), needs_mask)


def _fingerprint(item: _Item) -> str:
    """Changes when a file does, as far as its size and time tell."""
    parts = [str(item)]
    for path in map(Path, (item.image, *item.masks)):
        stat = path.stat() if path.is_file() else None
        parts.append(f"{stat.st_size} {stat.st_mtime_ns}" if stat else "none")
    return hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _problems(items: Sequence[_Item], mode: Mode) -> dict[_Item, str]:
    if mode == "off":
        return {}
    decoded = set(items) if mode == "full" else _within_budget(items) if mode == "auto" else set()
    return _run(items, lambda item: _unusable(item, decode=item in decoded))


def _within_budget(items: Sequence[_Item]) -> set[_Item]:
    """As many images as have :data:`_AUTO_PIXELS`, spread evenly."""
    step = sum(map(_pixels, items)) // _AUTO_PIXELS + 1
    if step > 1:
        logger.info("Of the many pixels of %d images, those of every %dth image are read in advance.", len(items), step)
    return set(items[::step])


def _run(items: Iterable[_Item], problem: Callable[[_Item], str]) -> dict[_Item, str]:
    items = list(dict.fromkeys(items))
    with ThreadPoolExecutor(_THREADS) as pool:
        done = tqdm(pool.map(problem, items), "checking images", len(items), disable=len(items) <= _MANY, leave=False)
        return {item: found for item, found in zip(items, done, strict=True) if found}


def _message(problems: dict[_Item, str]) -> str:
    shown = list(problems.values())[:_SHOWN]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return "\n  ".join([f"{len(problems)} image(s) cannot be used:", *shown, *more])


_large_images = Semaphore()


def _unreadable(item: _Item, *, decode: bool = True) -> str:
    try:
        for path in (item.image, *item.masks):
            if _pixels(_Item(path)) > _LARGE:
                with _large_images:
                    check_image(path, decode=decode or path in item.masks)
            else:
                check_image(path, decode=decode or path in item.masks)
    except OSError as error:
        return str(error) if error.errno is None else f"{item.image}: {error}"
    return ""


def _unusable(item: _Item, *, decode: bool) -> str:
    image = item.image
    if item.needs_mask and not item.masks:
        return f"{image} is anomalous and has no mask, while other images have one. Add the mask, or give no masks."
    if missing := [mask for mask in item.masks if not Path(mask).is_file()]:
        return f"{missing[0]}, the mask of {image}, does not exist."
    if problem := _unreadable(item, decode=decode):
        return problem
    width, height = _size(image)
    for mask in item.masks:
        mask_width, mask_height = _size(mask)
        if abs(mask_width * height - mask_height * width) > max(width, height):  # more than a pixel of the mask
            return (
                f"{mask} is a mask of {mask_width}x{mask_height} pixels for an image of {width}x{height}, {image}. "
                "It has to have the image's proportions."
            )
    if item.masks and all(map(is_blank, item.masks)):
        return (
            f"{', '.join(item.masks)} marks nothing, while its image, {image}, is anomalous. Replace the mask, or put "
            "the image among the normal ones."
        )
    return ""


def _pixels(item: _Item) -> int:
    try:
        width, height = _size(item.image)
    except Exception:
        return 0
    return width * height


def _size(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size
