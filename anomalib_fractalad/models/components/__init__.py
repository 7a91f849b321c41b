# SPDX-License-Identifier: Apache-2.0
"""Parts that at least two models share."""

from .arguments import check_count, check_not_negative, check_positive, is_finite, is_whole
from .backbone import Backbone, FrozenTeacher
from .discrepancy import at_least_float32, cosine_distance
from .generator import AnomalyGenerator, GeneratorChoice
from .network import AnomalyNetwork
from .region import RegionOfInterest, recorded
from .resampling import AlignedUpsample, Upsample, resize
from .score import ImageScore, Reduction
from .smoothing import GaussianSmoothing, gaussian_blur
from .tiling import TileByTile
from .within import anomalies_within

__all__ = [
    "AlignedUpsample",
    "AnomalyGenerator",
    "AnomalyNetwork",
    "Backbone",
    "FrozenTeacher",
    "GaussianSmoothing",
    "GeneratorChoice",
    "ImageScore",
    "Reduction",
    "RegionOfInterest",
    "TileByTile",
    "Upsample",
    "anomalies_within",
    "at_least_float32",
    "check_count",
    "check_not_negative",
    "check_positive",
    "cosine_distance",
    "gaussian_blur",
    "is_finite",
    "is_whole",
    "recorded",
    "resize",
]
