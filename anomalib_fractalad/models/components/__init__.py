# SPDX-License-Identifier: Apache-2.0
"""Parts that at least two models share."""

from .arguments import check_count, check_not_negative, check_positive, is_finite, is_whole
from .backbone import Backbone, FrozenTeacher
from .discrepancy import at_least_float32, cosine_distance
from .generator import AnomalyGenerator, GeneratorChoice
from .resampling import resample
from .score import ImageScore, Reduction
from .smoothing import gaussian_blur
from .tiling import predict_by_tiles

__all__ = [
    "AnomalyGenerator",
    "Backbone",
    "FrozenTeacher",
    "GeneratorChoice",
    "ImageScore",
    "Reduction",
    "at_least_float32",
    "check_count",
    "check_not_negative",
    "check_positive",
    "cosine_distance",
    "gaussian_blur",
    "is_finite",
    "is_whole",
    "predict_by_tiles",
    "resample",
]
