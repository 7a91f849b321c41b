# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection models, one package for each."""

import importlib
from typing import TYPE_CHECKING, Any

# First, so that the registration hooks find this package's models untouched whichever import comes first.
import anomalib.models  # noqa: F401

from anomalib_fractalad.registration import MODELS

if TYPE_CHECKING:
    from anomalib_fractalad.models.aand import AAND, AANDModel
    from anomalib_fractalad.models.adps import ADPS, ADPSModel
    from anomalib_fractalad.models.fractalad import FractalAD, FractalADModel
    from anomalib_fractalad.models.fractalmemory import FractalMemory, FractalMemoryModel

__all__ = [
    "AAND",
    "ADPS",
    "AANDModel",
    "ADPSModel",
    "FractalAD",
    "FractalADModel",
    "FractalMemory",
    "FractalMemoryModel",
]


def __getattr__(name: str) -> Any:
    """Import a model's package when it is asked for."""
    model = name.removesuffix("Model")
    if model not in MODELS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f"{__name__}.{model.lower()}"), name)
