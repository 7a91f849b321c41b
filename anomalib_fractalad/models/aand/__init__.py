# SPDX-License-Identifier: Apache-2.0
"""AAND: a pre-trained teacher whose anomalies are amplified, and a student that distils its normal features."""

from .lightning_model import AAND
from .torch_model import AANDModel

__all__ = ["AAND", "AANDModel"]
