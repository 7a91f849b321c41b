# SPDX-License-Identifier: Apache-2.0
"""Region of interest: the part of all images that counts."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Transform

from anomalib_fractalad.image_files import UnreadableImageError, read_mask

RECORD = "data:image/png;base64,"
OUTSIDE = 0.5  # what images show outside
LOWEST = 0.0  # and maps: no anomaly map of the package is below
ROUNDING = 1e-5


def read_roi(roi: str | Path) -> Tensor:
    """Read a region of interest.

    Args:
        roi: An image file whose gray levels above 0 are inside, or what :func:`record` made of one.

    Returns:
        (H, W), true inside.

    Raises:
        ValueError: If nothing is inside.
        UnreadableImageError: If the file cannot be read as an image.
        FileNotFoundError: If there is no such file.
    """
    if str(roi).startswith(RECORD):
        name, source = "the recorded roi", io.BytesIO(base64.b64decode(str(roi)[len(RECORD) :]))
        with Image.open(source) as image:
            inside = torch.from_numpy(np.array(image.convert("L")) > 0)
    else:
        name = f"roi {str(roi)!r}"
        if not Path(roi).is_file():
            msg = f"{name} is no file; give a mask image that is white on what is to be inspected"
            raise FileNotFoundError(msg)
        try:
            mask = read_mask(roi, as_tensor=True)
        except UnreadableImageError as error:
            msg = f"the region of interest cannot be read: {error}"
            raise UnreadableImageError(msg) from error
        inside = torch.as_tensor(np.asarray(mask)) > 0
    if not inside.any():
        msg = f"{name} is black everywhere, so nothing would be inspected; paint white what counts"
        raise ValueError(msg)
    return inside


def record(roi: str | Path) -> str:
    """Turn a region into text that stands for it without its file: plain data, for checkpoints and configurations.

    Args:
        roi: As for :func:`read_roi`, which reads what this returns.
    """
    if str(roi).startswith(RECORD):
        return str(roi)
    buffer = io.BytesIO()
    Image.fromarray(read_roi(roi).numpy()).save(buffer, "PNG", optimize=True)
    return RECORD + base64.b64encode(buffer.getvalue()).decode()


def recorded(weights: str | Path | None, roi: str | Path | None) -> tuple[str | None, str | None]:
    """Turn what arguments name of files into plain data, which a checkpoint can hold: a path and a region.

    Args:
        weights: A file of weights, or none.
        roi: As for :func:`read_roi`, or none.

    Returns:
        The path of the weights, and what :func:`record` makes of the region.
    """
    return None if weights is None else str(weights), None if roi is None else record(roi)


def check_roi(roi: str | Path, sizes: Iterable[tuple[int, int]]) -> None:
    """Refuse a region whose proportions are not those of the images.

    Args:
        roi: As for :func:`read_roi`.
        sizes: Width and height of images.

    Raises:
        ValueError: If the proportions of one differ by more than a pixel of the region or of the image.
    """
    check_proportions(tuple(read_roi(roi).shape), sizes)


def check_proportions(region: tuple[int, ...], sizes: Iterable[tuple[int, int]]) -> None:
    """The same for a region of a known height and width."""
    height, width = region
    for image_width, image_height in sizes:
        if abs(image_width * height - image_height * width) > max(width, height, image_width, image_height):
            msg = (
                f"the region of interest (roi) has {width}x{height} pixels, and an image {image_width}x{image_height}: "
                "they must have the same proportions. Draw the region on one of the images"
            )
            raise ValueError(msg)


class RegionOfInterest(nn.Module):
    """What of an image counts: outside, images are gray, maps are at their lowest, and scores take nothing from there.

    A pixel that the network sees is inside where all that it is resized from is, so that what lies outside changes
    neither maps nor scores; exactly so where the region has the images' size. It is part of exported networks.

    Args:
        roi: The region, (H, W), true inside.
        transform: How the pre-processor transforms images, so that the region is transformed alike.

    Raises:
        ValueError: If nothing is left of the region in the size that the network sees.
    """

    inside: Tensor

    def __init__(self, roi: Tensor, transform: Transform | None = None) -> None:
        super().__init__()
        self.source_size: tuple[int, int] = (roi.shape[0], roi.shape[1])
        image = roi.expand(1, 3, -1, -1).float()
        transformed = image if transform is None else transform(image)
        inside = (transformed[:, :1] - 1).abs() < ROUNDING
        if not inside.any():
            height, width = inside.shape[-2:]
            msg = (
                f"nothing is left of the region of interest (roi) in the {width}x{height} pixels that the network sees "
                "of an image: paint it larger, or let the pre-processor resize to a larger image"
            )
            raise ValueError(msg)
        self.pixel_count = int(inside.sum())
        self.register_buffer("inside", inside, persistent=False)

    @property
    def share(self) -> float:
        """Share of the pixels that the network sees that are inside, in (0, 1]."""
        return self.pixel_count / self.inside.numel()

    def hide(self, images: Tensor) -> Tensor:
        """Make images gray outside.

        Args:
            images: (B, C, H, W), of the size that the pre-processor makes of the region.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: If the size is another one.
        """
        self.check_size(images.shape[-2:])
        return torch.where(self.inside, images, OUTSIDE)

    def lower(self, maps: Tensor) -> Tensor:
        """Set maps (B, 1, H, W) to their lowest value outside."""
        return torch.where(self.inside, maps, LOWEST)

    def pixels(self, maps: Tensor) -> Tensor:
        """The values inside, (B, N), of maps (B, 1, H, W) or (B, H, W)."""
        return maps.reshape(len(maps), -1)[:, self.inside.flatten()]

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse images of a height and width that are not the region's in the network.

        Raises:
            ValueError: If so.
        """
        if tuple(size) != tuple(self.inside.shape[-2:]):
            (height, width), (own_height, own_width) = size, self.inside.shape[-2:]
            msg = (
                f"an image of {width}x{height} comes to the network, and the region of interest (roi) is one of "
                f"{own_width}x{own_height}: let the pre-processor resize to one size, or give images of that size"
            )
            raise ValueError(msg)
