# SPDX-License-Identifier: Apache-2.0
"""AAND: a pre-trained teacher whose anomalies are amplified, and a student that distills its normal features."""

from typing import TYPE_CHECKING, Any

from .torch_model import AANDModel

if TYPE_CHECKING:
    from .lightning_model import AAND

__all__ = ["AAND", "AANDModel"]


def __getattr__(name: str) -> Any:
    """Import Lightning only for the Lightning module."""
    if name != "AAND":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from .lightning_model import AAND  # noqa: PLC0415

    return AAND
