# SPDX-License-Identifier: Apache-2.0
"""Synthetic anomalies."""

from .fractal import FractalAnomalyGenerator

__all__ = ["FractalAnomalyGenerator"]
