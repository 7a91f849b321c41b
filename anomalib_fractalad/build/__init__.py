# SPDX-License-Identifier: Apache-2.0
"""What choosing a model from normal images alone takes."""

from anomalib_fractalad.build.defects import DEFECTS

__all__ = ["DEFECTS"]
