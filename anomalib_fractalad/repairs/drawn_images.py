# SPDX-License-Identifier: Apache-2.0
"""Heat maps of gray images of more than 8 bits are drawn on white."""

from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

from .base import Repair
from .replacing import replace, replaced

_MODULE = "anomalib.visualization.image.item_visualizer"


def _replacement() -> tuple[str, str, Any]:
    from anomalib_fractalad.image_files import open_rgb  # noqa: PLC0415

    return _MODULE, "Image", SimpleNamespace(open=open_rgb)


def drawn_as_read() -> AbstractContextManager[None]:
    """Have anomalib's visualizer open images as they are read for the model, for the duration."""
    return replaced(*_replacement())


def _apply(for_all: bool) -> None:
    if for_all:  # this package's models have a visualizer of their own
        replace(*_replacement())


DRAWN_IMAGES = Repair(
    name="drawn images",
    defect="Heat maps of gray images of more than 8 bits are drawn on white.",
    versions=">=2.7,<2.8",
    modules=(_MODULE,),
    apply=_apply,
)
