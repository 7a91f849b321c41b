# SPDX-License-Identifier: Apache-2.0
"""Data modules."""

import importlib
from typing import TYPE_CHECKING, Any

# First, so that the registration hooks find this package's data modules untouched whichever import comes first.
import anomalib.data  # noqa: F401

from anomalib_fractalad.data.surface_defects import SurfaceDefects

if TYPE_CHECKING:
    from anomalib_fractalad.data.synthetic_validation import SyntheticValidation

__all__ = ["SurfaceDefects", "SyntheticValidation"]


def __getattr__(name: str) -> Any:
    if name != "SyntheticValidation":  # which needs what is registered after the data modules
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return importlib.import_module("anomalib_fractalad.data.synthetic_validation").SyntheticValidation
