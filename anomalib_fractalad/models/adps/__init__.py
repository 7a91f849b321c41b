# SPDX-License-Identifier: Apache-2.0
"""ADPS: asymmetric distillation of whole images and patches, weight mask block, post-segmentation."""

from typing import TYPE_CHECKING, Any

from .torch_model import ADPSModel

if TYPE_CHECKING:
    from .lightning_model import ADPS

__all__ = ["ADPS", "ADPSModel"]


def __getattr__(name: str) -> Any:
    """Import Lightning only for the Lightning module."""
    if name != "ADPS":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from .lightning_model import ADPS  # noqa: PLC0415

    return ADPS
