# SPDX-License-Identifier: Apache-2.0
"""Data sets of anomalib that read as this package's models need it, for as long as such a model runs."""

from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import Any

from .base import acts
from .image_reading import IMAGE_READING, repaired_reading
from .mask_sizes import MASK_SIZES, fit_mask

_ORIGINAL = "_anomalib_fractalad_original"


@cache
def _repaired(kind: Any) -> type:
    """The class of data sets that reads as ``kind`` does, but by this package's readers.

    A second base class would change the layout of its objects, and Python would not let a data set change its class.
    """

    def get_item(dataset: Any, index: int) -> Any:
        if not acts(IMAGE_READING):
            return _item(dataset, kind, index)
        with repaired_reading(kind):
            return _item(dataset, kind, index)

    def reduce(dataset: Any) -> tuple[Any, ...]:  # for workers that are spawned
        return _rebuild, (kind, dict(dataset.__dict__))

    content: dict[str, Any] = {
        "__getitem__": get_item,
        "__reduce__": reduce,
        "__module__": kind.__module__,
        _ORIGINAL: kind,
    }
    return type(kind.__name__, (kind,), content)


def _item(dataset: Any, kind: Any, index: int) -> Any:
    if hasattr(dataset, "augmentations") and acts(MASK_SIZES):
        return fit_mask(partial(kind.__getitem__, dataset), dataset, index)
    return kind.__getitem__(dataset, index)


def _rebuild(kind: type, content: dict[str, Any]) -> Any:
    dataset: Any = object.__new__(_repaired(kind))
    dataset.__dict__.update(content)
    return dataset


def repair(datasets: Iterable[Any]) -> list[Any]:
    """Have anomalib's data sets of images read in the repaired way, those within torch's wrappers included.

    Args:
        datasets: Data sets; those of other kinds are passed over.

    Returns:
        Those that were changed, for :func:`restore`.
    """
    from anomalib.data import AnomalibDataset, PredictDataset  # noqa: PLC0415
    from anomalib.data.datasets.base import AnomalibVideoDataset  # noqa: PLC0415

    changed = []
    for dataset in _unwrapped(datasets):
        known = isinstance(dataset, AnomalibDataset | PredictDataset) and not isinstance(dataset, AnomalibVideoDataset)
        if known and not hasattr(dataset, _ORIGINAL):
            kind: Any = type(dataset)
            dataset.__class__ = _repaired(kind)
            changed.append(dataset)
    return changed


def restore(datasets: Iterable[Any]) -> None:
    """Undo :func:`repair`.

    Args:
        datasets: What it returned.
    """
    for dataset in datasets:
        if hasattr(dataset, _ORIGINAL):
            dataset.__class__ = getattr(dataset, _ORIGINAL)


def _unwrapped(datasets: Iterable[Any]) -> Iterator[Any]:
    for dataset in datasets:
        yield dataset
        inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or [])]
        yield from _unwrapped([one for one in inner if one is not None and one is not dataset])
