# SPDX-License-Identifier: Apache-2.0
"""FractalAD: fractal anomaly generation, backbone distillation, cosine similarity attention, segmentation."""

from typing import TYPE_CHECKING, Any

from .torch_model import FractalADModel

if TYPE_CHECKING:
    from .lightning_model import FractalAD

__all__ = ["FractalAD", "FractalADModel"]


def __getattr__(name: str) -> Any:
    """Import Lightning only for the Lightning module."""
    if name != "FractalAD":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from .lightning_model import FractalAD  # noqa: PLC0415

    return FractalAD
