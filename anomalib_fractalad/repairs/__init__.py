# SPDX-License-Identifier: Apache-2.0
"""Repairs of defects of anomalib, one file each.

They act for this package's models, and leave all other models as anomalib has them. The environment variable
``ANOMALIB_FRACTALAD_REPAIRS`` turns them on for every model (``all``) or off (``none``).
``python -m anomalib_fractalad status`` lists them.
"""

from .base import Repair, acts, mend, mend_when_imported, reach, state
from .benchmark_results import BENCHMARK_RESULTS
from .command_line import COMMAND_LINE
from .drawn_images import DRAWN_IMAGES
from .image_paths import IMAGE_PATHS
from .image_reading import IMAGE_READING
from .inferencers import INFERENCERS
from .mask_sizes import MASK_SIZES
from .text_columns import TEXT_COLUMNS

REPAIRS = (
    IMAGE_READING,
    MASK_SIZES,
    IMAGE_PATHS,
    DRAWN_IMAGES,
    INFERENCERS,
    COMMAND_LINE,
    BENCHMARK_RESULTS,
    TEXT_COLUMNS,
)

__all__ = ["REPAIRS", "Repair", "acts", "mend", "mend_when_imported", "reach", "state"]
