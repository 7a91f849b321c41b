# SPDX-License-Identifier: Apache-2.0
"""FractalAD: fractal anomaly generation, backbone distillation, cosine similarity attention, segmentation."""

from .lightning_model import FractalAD
from .torch_model import FractalADModel

__all__ = ["FractalAD", "FractalADModel"]
