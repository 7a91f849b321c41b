# SPDX-License-Identifier: Apache-2.0
"""Refusing images that something has normalized: the networks normalize by themselves."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from .loaders import current_loaders, datasets_of

TOLERANCE = 0.1  # what a bicubic resize may overstep [0, 1] by
_PLACES = ("augmentations", "train_augmentations", "val_augmentations", "test_augmentations", "transform", "transforms")


class PlainImages(Callback):
    """Refuses a Normalize before the network, and batches whose values are far from [0, 1]."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for Normalize in the data module's augmentations and the pre-processor.

        Raises:
            ValueError: If there is one; the message names the place.
        """
        del stage
        datamodule = getattr(trainer, "datamodule", None)
        name = type(datamodule).__name__
        for place in _PLACES:
            _refuse(pl_module, getattr(datamodule, place, None), f"{place} of the data module ({name})")
        pre_processor = getattr(pl_module, "pre_processor", None)
        _refuse(pl_module, getattr(pre_processor, "transform", None), f"pre-processor of {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for Normalize in the data sets; raises as :meth:`setup`."""
        _refuse_in_datasets(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for Normalize in the data sets; raises as :meth:`setup`."""
        _refuse_in_datasets(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for Normalize in the data sets; raises as :meth:`setup`."""
        _refuse_in_datasets(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for Normalize in the data sets; raises as :meth:`setup`."""
        _refuse_in_datasets(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the first batch's values.

        Raises:
            ValueError: If they are far from [0, 1].
        """
        del trainer
        _check_range(pl_module, batch, batch_idx, "training")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch's values; raises as for training."""
        del trainer, dataloader_idx
        _check_range(pl_module, batch, batch_idx, "validation")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch's values; raises as for training."""
        del trainer, dataloader_idx
        _check_range(pl_module, batch, batch_idx, "test")

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the first batch's values; raises as for training."""
        del trainer, dataloader_idx
        _check_range(pl_module, batch, batch_idx, "prediction")


def find_normalize(transform: Any) -> bool:
    """Whether a transform normalizes, however deep in others: torchvision's of both versions, kornia's and the like.

    Args:
        transform: A transform, a module, or a collection of these.
    """
    return any(type(part).__name__ == "Normalize" for part in _parts(transform, set()))


def _parts(transform: Any, seen: set[int]) -> Iterator[Any]:
    if id(transform) in seen or isinstance(transform, str | bytes | int | float | Tensor | type | None):
        return
    seen.add(id(transform))
    if isinstance(transform, Mapping):
        inner = list(transform.values())
    elif isinstance(transform, list | tuple | set):
        inner = list(transform)
    else:
        yield transform
        inner = list(getattr(transform, "__dict__", {}).values()) if callable(transform) else []
        inner += list(getattr(transform, "args", ())) if type(transform).__name__ == "partial" else []
        inner += [getattr(transform, name, None) for name in ("func", "__self__", "__wrapped__")]
        inner += list(transform.children()) if isinstance(transform, nn.Module) else []
    for part in inner:
        yield from _parts(part, seen)


def _refuse(module: LightningModule, transform: Any, place: str) -> None:
    if find_normalize(transform):
        name = type(module).__name__
        msg = (
            f"the {place} must not contain Normalize: {name} makes anomalies on images in [0, 1], and its network "
            "normalizes by itself, also images that are predicted by path or by an exported model. Leave it out there."
        )
        raise ValueError(msg)


def _refuse_in_datasets(trainer: Trainer, module: LightningModule) -> None:
    for dataset in datasets_of(current_loaders(trainer)):
        inner = dataset
        while inner is not None:
            for place in _PLACES:
                _refuse(module, getattr(inner, place, None), f"{place} of the data set ({type(inner).__name__})")
            inner = getattr(inner, "dataset", None)


def _check_range(module: LightningModule, batch: Any, index: int, what: str) -> None:
    images = getattr(batch, "image", None)
    if index or not isinstance(images, Tensor) or not images.numel():
        return
    low, high = (float(value) for value in images.aminmax())
    if not -TOLERANCE <= low <= high <= 1 + TOLERANCE:
        msg = (
            f"the first images of the {what} have values from {low:.3g} to {high:.3g}, and {type(module).__name__} "
            "takes images in [0, 1]. Let the loader give them so: as floating point, not normalized, and scaled."
        )
        raise ValueError(msg)
