# SPDX-License-Identifier: Apache-2.0
"""FractalMemory: whitened features of a frozen teacher, a memory of normal ones, and a head on the residual."""

from typing import TYPE_CHECKING, Any

from .torch_model import FractalMemoryModel

if TYPE_CHECKING:
    from .lightning_model import FractalMemory

__all__ = ["FractalMemory", "FractalMemoryModel"]


def __getattr__(name: str) -> Any:
    """Import Lightning only for the Lightning module."""
    if name != "FractalMemory":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from .lightning_model import FractalMemory  # noqa: PLC0415

    return FractalMemory
