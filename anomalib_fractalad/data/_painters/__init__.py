# SPDX-License-Identifier: Apache-2.0
"""The images of SurfaceDefects, painted by procedures that share nothing with the fractal generator."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from anomalib_fractalad.data._painters import fabric, metal_plate, molded_part
from anomalib_fractalad.data._painters.canvas import encode, expose, photograph

PAINTERS = {"fabric": fabric, "metal_plate": metal_plate, "molded_part": molded_part}
_VISIBLE = 4.0
"""Gray levels by which a pixel must differ from the defect-free image to count as defective."""


class Sample(NamedTuple):
    """One inspection image, its defect-free twin and the mask (0 or 255) of where the two differ."""

    image: NDArray[np.uint8]
    twin: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def paint(category: str, seed: tuple[int, ...], defect: str | None = None, severity: float = 0.0) -> Sample:
    """Paint one image.

    Args:
        category: A key of ``PAINTERS``.
        seed: Non-negative numbers that fix the part, its light, the defect's shape and the sensor noise.
        defect: One of the category's ``DEFECTS``, or None.
        severity: From 0, barely seen, to 1, obvious.
    """
    painter = PAINTERS[category]
    scene, flaw, sensor = np.random.SeedSequence([list(PAINTERS).index(category), *seed]).spawn(3)

    def light(name: str | None) -> NDArray[np.float64]:
        return expose(painter.paint(np.random.default_rng(scene), name, severity, np.random.default_rng(flaw)))

    clean = light(None)
    twin = photograph(clean, np.random.default_rng(sensor))
    if defect is None:
        return Sample(twin, twin, np.zeros(twin.shape[:2], np.uint8))
    flawed = light(defect)
    mask = _visible(encode(clean), encode(flawed))
    image = np.where(mask[..., None] > 0, photograph(flawed, np.random.default_rng(sensor)), twin)
    return Sample(image, twin, mask)


def _visible(clean: NDArray[np.float64], flawed: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Where two noise-free images differ visibly, small gaps closed."""
    changed = np.abs(flawed - clean).max(-1) > _VISIBLE
    mask = Image.fromarray(changed.astype(np.uint8) * 255)
    closed = mask.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    return np.asarray(closed)
