# SPDX-License-Identifier: Apache-2.0
"""Parts that at least two models share."""

from .backbone import Backbone, FrozenTeacher
from .discrepancy import at_least_float32, cosine_distance
from .generator import AnomalyGenerator, GeneratorChoice
from .lightning_module import DistillationModule, check_positive
from .resampling import AlignedUpsample, Upsample
from .score import ImageScore, Reduction
from .smoothing import GaussianSmoothing, gaussian_blur
from .tiling import TileByTile

__all__ = [
    "AlignedUpsample",
    "AnomalyGenerator",
    "Backbone",
    "DistillationModule",
    "FrozenTeacher",
    "GaussianSmoothing",
    "GeneratorChoice",
    "ImageScore",
    "Reduction",
    "TileByTile",
    "Upsample",
    "at_least_float32",
    "check_positive",
    "cosine_distance",
    "gaussian_blur",
]
