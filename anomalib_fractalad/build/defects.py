# SPDX-License-Identifier: Apache-2.0
"""Synthetic defects of ten kinds, made in normal images, to tell models apart without a defective image.

Four kinds are small and sharp: fractal and Perlin anomalies, two of them faint, and a scar. Five are large spots with
soft edges, of another texture or brightness, which generators that models train with do not make. The last is a crack.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from math import tau
from types import MappingProxyType
from typing import Protocol

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.models.image.foundad.components.cutpaste import CutPasteScar
from kornia.filters import gaussian_blur2d
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.transforms.v2.functional import center_crop, resize

from anomalib_fractalad.transforms import FractalAnomalyGenerator

SMALLEST = 64  # pixels a side; a scar is up to 25 pixels long, and rotated
REFERENCE_SIZE = 256  # lengths of spots and cracks are of images of this size, and grow with the image
VISIBLE = 2 / 255
DRAWS = 8

_Painted = tuple[Tensor, Tensor]


class Defect(Protocol):
    """Makes one kind of defect."""

    def __call__(self, image: Tensor, severity: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Make a defect in a normal image.

        Args:
            image: (3, H, W), at least 64 pixels a side, values in [0, 1].
            severity: Share of the defect's full strength, above 0 and at most 1. It changes how much the defect differs
                from what is around it, not where it lies.
            seed: Seed of the defect's place and shape; the caller's random numbers go on as if nothing had happened.

        Returns:
            The image with the defect (3, H, W), values in [0, 1], and the defect's mask (1, H, W), boolean. The mask is
            empty where the image leaves nothing to see, as a scar that is cut out of a plain image.

        Raises:
            ValueError: If image or severity are not as described.
        """


def _defect(paint: Callable[[Tensor], _Painted]) -> Defect:
    """Make a kind of defect of a function that paints it at full strength and tells its mask."""

    @wraps(paint)
    def make(image: Tensor, severity: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
        _check(image, severity)
        with _seeded(seed, image.device), torch.no_grad():
            for _ in range(DRAWS):
                painted, mask = paint(image)
                if mask.any():
                    break
        return image.lerp(painted.clamp(0, 1), severity), mask

    return make


def _check(image: Tensor, severity: float) -> None:
    if image.dim() != 3 or len(image) != 3 or min(image.shape[-2:]) < SMALLEST:
        msg = f"the image has the shape {tuple(image.shape)}; it must be (3, H, W), at least {SMALLEST} pixels a side"
        raise ValueError(msg)
    if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        msg = f"the image has values from {image.min()} to {image.max()}, {image.dtype}; they must be floats in [0, 1]"
        raise ValueError(msg)
    if not 0 < severity <= 1:
        msg = f"severity is {severity}; it must be above 0 and at most 1"
        raise ValueError(msg)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    before = random.getstate()  # anomalib's scar draws from it
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


def _changed(image: Tensor, painted: Tensor) -> Tensor:
    return (painted - image).abs().amax(dim=0, keepdim=True) > VISIBLE


@_defect
def fractal(image: Tensor) -> _Painted:
    """Another part of the image in the shape of a fractal, anywhere up to the edges."""
    painted = FractalAnomalyGenerator(position_margin=0)(image.unsqueeze(0))[0].squeeze(0)
    return painted, _changed(image, painted)


@_defect
def faint_fractal(image: Tensor) -> _Painted:
    """A fractal anomaly of two fifths of its strength."""
    painted = FractalAnomalyGenerator(position_margin=0)(image.unsqueeze(0))[0].squeeze(0)
    painted = image.lerp(painted, 0.4)
    return painted, _changed(image, painted)


@_defect
def faint_perlin(image: Tensor) -> _Painted:
    """Noise in the shape of Perlin noise, as DRAEM's, of two fifths of its strength."""
    noisy = PerlinAnomalyGenerator(probability=1.0)(image.unsqueeze(0))[0].squeeze(0).clamp(0, 1)
    painted = image.lerp(noisy, 0.4)
    return painted, _changed(image, painted)


@_defect
def scar(image: Tensor) -> _Painted:
    """A thin strip of the image, rotated and pasted elsewhere, as CutPaste's."""
    painted = CutPasteScar(color_jitter=None)(image)
    return painted, _changed(image, painted)


@_defect
def smooth(image: Tensor) -> _Painted:
    """A soft-edged spot that is blurred."""
    return _spot(image, gaussian_blur2d(image.unsqueeze(0), (13, 13), (2.0, 2.0)).squeeze(0))


@_defect
def rough(image: Tensor) -> _Painted:
    """A soft-edged spot of gray noise."""
    return _spot(image, image + 0.06 * torch.randn_like(image[:1]))


@_defect
def zoomed(image: Tensor) -> _Painted:
    """A soft-edged spot whose texture is twice as coarse."""
    height, width = image.shape[-2:]
    return _spot(image, resize(center_crop(image, [height // 2, width // 2]), [height, width]))


@_defect
def turned(image: Tensor) -> _Painted:
    """A soft-edged spot whose texture runs in the other direction."""
    turned_image, size = image.mT, list(image.shape[-2:])
    return _spot(image, turned_image if turned_image.shape == image.shape else resize(turned_image, size))


@_defect
def bright(image: Tensor) -> _Painted:
    """A soft-edged spot that is brighter by a fifth of the range."""
    return _spot(image, image + 0.2)


@_defect
def crack(image: Tensor) -> _Painted:
    """A dark winding line, two pixels wide."""
    scale = min(image.shape[-2:]) / REFERENCE_SIZE
    length = max(2, round(70 * scale))
    angle = tau * torch.rand(1) + torch.cumsum(0.25 * torch.randn(length), 0)
    steps = torch.cumsum(torch.stack([angle.sin(), angle.cos()]), 1)
    row, column = (_place(image, scale).unsqueeze(1) + steps).round().long()
    inside = (row >= 0) & (column >= 0) & (row < image.shape[-2]) & (column < image.shape[-1])
    line = torch.zeros(1, *image.shape[-2:])
    line[0, row[inside], column[inside]] = 1
    line = max_pool2d(line, 2, 1, 1)[..., :-1, :-1].to(image)
    return image - 0.12 * line, line > 0


def _spot(image: Tensor, texture: Tensor) -> _Painted:
    """A Gaussian spot of another texture, of a standard deviation of 20 to 50 pixels in an image of 256x256."""
    scale = min(image.shape[-2:]) / REFERENCE_SIZE
    row, column = _place(image, scale)
    width = (20 + 30 * torch.rand(1)) * scale
    rows, columns = (torch.arange(float(length)) for length in image.shape[-2:])
    distance = (rows[:, None] - row) ** 2 + (columns - column) ** 2
    spot = torch.exp(-distance / (2 * width**2)).unsqueeze(0).to(image)
    return image.lerp(texture.clamp(0, 1), spot), spot > 0.5


def _place(image: Tensor, scale: float) -> Tensor:
    """A row and a column, not too close to the edges."""
    margin = 48 * scale
    return torch.stack([margin + torch.rand(1).squeeze() * (length - 2 * margin) for length in image.shape[-2:]])


DEFECTS: Mapping[str, Defect] = MappingProxyType(
    {
        "fractal": fractal,
        "faint fractal": faint_fractal,
        "faint Perlin": faint_perlin,
        "scar": scar,
        "smooth": smooth,
        "rough": rough,
        "zoomed": zoomed,
        "turned": turned,
        "bright": bright,
        "crack": crack,
    }
)
