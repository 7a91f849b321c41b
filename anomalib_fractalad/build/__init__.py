# SPDX-License-Identifier: Apache-2.0
"""From a folder of good images to a model at the line."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .defects import DEFECTS
    from .pipeline import build_part

__all__ = ["DEFECTS", "build_part"]

_LAZY = {"DEFECTS": ".defects", "build_part": ".pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(_LAZY[name], __name__), name)
