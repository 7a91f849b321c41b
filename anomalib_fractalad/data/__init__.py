# SPDX-License-Identifier: Apache-2.0
"""Data modules."""

# First, so that the registration hooks find this package's data modules untouched whichever import comes first.
import anomalib.data  # noqa: F401

from anomalib_fractalad.data.surface_defects import SurfaceDefects

__all__ = ["SurfaceDefects"]
