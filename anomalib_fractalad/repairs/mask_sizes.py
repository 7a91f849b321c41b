# SPDX-License-Identifier: Apache-2.0
"""A mask of another size than its image cannot be put into one batch with the masks of normal images."""

from collections.abc import Callable
from typing import Any

from .base import Repair


def fit_mask(get_item: Callable[[int], Any], dataset: Any, index: int) -> Any:
    """Read an item of an anomalib data set, the mask brought to the image's size before augmentations.

    Args:
        get_item: Reads an image and its mask, and calls the data set's augmentations on them.
        dataset: The data set.
        index: Index of the item.

    Returns:
        The item.
    """
    from torchvision.transforms.v2.functional import resize  # noqa: PLC0415

    def augment(image: Any, *masks: Any) -> Any:
        masks = tuple(mask if mask.shape[-2:] == image.shape[-2:] else resize(mask, image.shape[-2:]) for mask in masks)
        if augmentations:
            return augmentations(image, *masks)
        return (image, *masks) if masks else image

    augmentations, dataset.augmentations = dataset.augmentations, augment
    try:
        return get_item(index)
    finally:
        dataset.augmentations = augmentations


def _apply(for_all: bool) -> None:
    if not for_all:
        return  # the data sets of this package's models call ``fit_mask``
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    def wrapper(get_item: Callable[[int], Any], dataset: Any, args: tuple[int], kwargs: dict[str, int]) -> Any:
        return fit_mask(get_item, dataset, *args, **kwargs)

    wrap_function_wrapper("anomalib.data.datasets.base.image", "AnomalibDataset.__getitem__", wrapper)


MASK_SIZES = Repair(
    name="mask sizes",
    defect="A mask of another size than its image cannot be put into one batch with the masks of normal images.",
    versions=">=2.7,<2.8",
    modules=("anomalib.data.datasets.base.image",),
    apply=_apply,
)
