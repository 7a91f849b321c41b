# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies."""

from .fractal import FractalAnomalyGenerator
from .lighting import LightingJitter
from .mixed import MixedAnomalyGenerator
from .regions import (
    CutPasteAnomalyGenerator,
    EraseAnomalyGenerator,
    RecolorAnomalyGenerator,
    RegionAnomalyGenerator,
    ScratchAnomalyGenerator,
    SwirlAnomalyGenerator,
    WarpAnomalyGenerator,
)

__all__ = [
    "CutPasteAnomalyGenerator",
    "EraseAnomalyGenerator",
    "FractalAnomalyGenerator",
    "LightingJitter",
    "MixedAnomalyGenerator",
    "RecolorAnomalyGenerator",
    "RegionAnomalyGenerator",
    "ScratchAnomalyGenerator",
    "SwirlAnomalyGenerator",
    "WarpAnomalyGenerator",
]
