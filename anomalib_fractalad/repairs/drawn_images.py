# SPDX-License-Identifier: Apache-2.0
"""Heat maps of gray images of more than 8 bits are drawn on white."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from .base import Repair

_MODULE = "anomalib.visualization.image.item_visualizer"


@contextmanager
def drawn_as_read() -> Iterator[None]:
    """Have anomalib's visualizer open images as they are read for the model."""
    original = _replace()
    try:
        yield
    finally:
        sys.modules[_MODULE].Image = original  # type: ignore[attr-defined]


def _replace() -> Any:
    from anomalib_fractalad.image_files import open_rgb  # noqa: PLC0415

    module: Any = sys.modules[_MODULE]
    original, module.Image = module.Image, SimpleNamespace(open=open_rgb)
    return original


def _apply(for_all: bool) -> None:
    if for_all:  # this package's models have a visualizer of their own
        _replace()


DRAWN_IMAGES = Repair(
    name="drawn images",
    defect="Heat maps of gray images of more than 8 bits are drawn on white.",
    versions=">=2.7,<2.8",
    modules=(_MODULE,),
    apply=_apply,
)
