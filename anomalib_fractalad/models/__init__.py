# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection models, one package for each."""

# First, so that the registration hooks find this package's models untouched whichever import comes first.
import anomalib.models  # noqa: F401

from anomalib_fractalad.models.aand import AAND, AANDModel
from anomalib_fractalad.models.adps import ADPS, ADPSModel
from anomalib_fractalad.models.fractalad import FractalAD, FractalADModel

__all__ = ["AAND", "ADPS", "AANDModel", "ADPSModel", "FractalAD", "FractalADModel"]
