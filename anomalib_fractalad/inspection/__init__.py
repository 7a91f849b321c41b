# SPDX-License-Identifier: Apache-2.0
"""Inspection at the line, with a part folder: needs ``openvino``, ``numpy`` and ``pillow`` alone.

:mod:`anomalib_fractalad.build.standalone` joins the modules to the one file ``inspect.py`` of a part folder.
"""

from .command import inspect_main
from .inspector import Inspector, draw_heat_map, find_defects
from .reading import UnreadableImageError, find_images, open_rgb

__all__ = [
    "Inspector",
    "UnreadableImageError",
    "draw_heat_map",
    "find_defects",
    "find_images",
    "inspect_main",
    "open_rgb",
]
