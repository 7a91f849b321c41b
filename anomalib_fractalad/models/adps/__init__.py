# SPDX-License-Identifier: Apache-2.0
"""ADPS: asymmetric distillation of whole images and patches, weight mask block, post-segmentation."""

from .lightning_model import ADPS
from .torch_model import ADPSModel

__all__ = ["ADPS", "ADPSModel"]
