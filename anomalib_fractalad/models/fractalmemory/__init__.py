# SPDX-License-Identifier: Apache-2.0
"""FractalMemory: whitened features of a frozen teacher, a memory of normal ones, and a head on the residual."""

from .lightning_model import FractalMemory
from .torch_model import FractalMemoryModel

__all__ = ["FractalMemory", "FractalMemoryModel"]
