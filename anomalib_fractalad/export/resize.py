# SPDX-License-Identifier: Apache-2.0
"""Resizing, cropping and padding that torch, ONNX Runtime and OpenVINO compute alike, for images of any size.

anomalib switches antialiasing off for export, and OpenVINO ignores it in ONNX's ``Resize``, so that an image that is
shrunk would score differently in the lab and on the line. Resizing by matrix products is the same everywhere. Products
are of bands, since a target position takes few source positions: by a whole matrix, a large image would take longer
than the network.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, Resize, Transform

BAND = 16  # target positions that are computed at once


class RowwiseTransform(Transform):  # type: ignore[misc]
    """A transform of images that does the same along rows and along columns."""

    def forward(self, image: Tensor) -> Tensor:
        """Transform.

        Args:
            image: (B, C, H, W), floating point.

        Returns:
            (B, C, *self.target(H, W)).
        """
        target = self.target(*image.shape[-2:])
        # One axis for batch and channels: OpenVINO fuses what follows a product into it, and takes the wrong axis for
        # the channels where it follows directly.
        transformed = self.along_rows(image.flatten(end_dim=-3), target[0])
        return self.along_rows(transformed.mT, target[1]).mT.reshape(*image.shape[:-2], *target)

    @abstractmethod
    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what comes of an image; all arguments may be symbolic."""

    @abstractmethod
    def along_rows(self, image: Tensor, target: int) -> Tensor:
        """Bring (N, H, W) to (N, target, W)."""


class AntialiasedResize(RowwiseTransform):
    """torchvision's ``Resize`` with antialiasing, bilinear or bicubic.

    Args:
        size: Height and width, or the shorter side; left out, ``max_size`` counts.
        max_size: The longer side, at most.
        cubic: Bicubic.
    """

    def __init__(self, size: tuple[int, ...] | None, max_size: int | None = None, cubic: bool = False) -> None:
        super().__init__()
        self.size = size
        self.max_size = max_size
        self.cubic = cubic

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that torchvision resizes to, without a choice that a graph would be frozen in."""
        return resized_size(height, width, self.size, self.max_size)

    def along_rows(self, image: Tensor, target: int) -> Tensor:
        """Resize the rows of (N, H, W) to (N, target, W)."""
        return resize_by_bands(image, *self.bands(image.shape[-2], target, image), target)

    def bands(self, length: int, target: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Source positions of each band of target positions, (bands, n), and their weights, (bands, BAND, n)."""
        # Whole numbers up to the last step, in units of which a source position has 2 * target and a target position
        # 2 * length: OpenVINO may compute in bfloat16, which cannot hold positions beyond 256.
        longer: Any = torch.sym_max(length, target)
        reach = (4 if self.cubic else 2) * longer
        first = torch.arange(0, target, BAND, device=like.device)
        position = first.unsqueeze(1) + torch.arange(BAND, device=like.device)
        position = _within(position, target)  # the last band may be short
        center = ((2 * position + 1) * length).unsqueeze(2)
        start = ((2 * first + 1) * length - reach) // (2 * target)
        count = ((BAND - 1) * length + reach) // target + 2
        source = start.unsqueeze(1) + torch.arange(count, device=like.device)
        inside = (source >= 0) & (source < length)
        distance = ((2 * source + 1) * target).unsqueeze(1) - center
        if self.cubic:
            weights = cubic_kernel(distance.abs().to(like.dtype) / (2 * longer))
        else:
            weights = (reach - distance.abs()).clamp(min=0).to(like.dtype)
        weights = weights * inside.unsqueeze(1)
        return _within(source, length), weights / weights.sum(dim=2, keepdim=True)


def resize_by_bands(image: Tensor, source: Tensor, weights: Tensor, target: int) -> Tensor:
    """Resize rows, some of them at once.

    Args:
        image: (N, H, W).
        source: Source positions of each band, (bands, n).
        weights: Their weights for each target position of the band, (bands, BAND, n).
        target: Number of target positions.

    Returns:
        (N, target, W).
    """
    rows = image.index_select(1, source.flatten()).reshape(image.shape[0], *source.shape, -1)
    resized: Tensor = weights @ rows
    return resized.flatten(1, 2)[:, :target]


def resized_size(height: int, width: int, size: tuple[int, ...] | None, max_size: int | None) -> tuple[int, int]:
    """Height and width that torchvision's ``Resize`` gives; those of the image may be symbolic.

    Args:
        height: Height of the image.
        width: Width of the image.
        size: Height and width, or the shorter side; left out, ``max_size`` counts.
        max_size: The longer side, at most.

    Returns:
        Height and width.
    """
    if size is not None and len(size) == 2:
        return size[0], size[1]
    if size is not None:
        shorter: Any = torch.sym_min(height, width)
        height, width = size[0] * height // shorter, size[0] * width // shorter
        if max_size is None:
            return height, width
        longest: Any = torch.sym_min(torch.sym_max(height, width), max_size)
    else:
        longest = max_size
    longer: Any = torch.sym_max(height, width)
    return height * longest // longer, width * longest // longer


def cubic_kernel(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5, as antialiased bicubic resizing has it.

    Args:
        distance: Distances in units of the kernel, at least 0.

    Returns:
        Weights of the same shape; 0 from a distance of 2 on.
    """
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))


class ExportCenterCrop(RowwiseTransform):
    """torchvision's ``CenterCrop``, which pads smaller images with zeros.

    Args:
        size: Height and width.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The size to crop to."""
        del height, width
        return self.size

    def along_rows(self, image: Tensor, target: int) -> Tensor:
        """Crop or pad the rows of (N, H, W) to (N, target, W)."""
        length = image.shape[1]
        surplus = torch.full((), length - target, device=image.device)
        half = surplus // 2
        # torchvision rounds half a pixel to the even number, and pads less on the left.
        start = torch.where(surplus >= 0, half + surplus % 2 * (half % 2), half + surplus % 2)
        source = torch.arange(target, device=image.device) + start
        inside = (source >= 0) & (source < length)
        return image.index_select(1, _within(source, length)) * inside.to(image.dtype).unsqueeze(1)


class ExportSquarePad(RowwiseTransform):
    """anomalib's ``SquarePad``: the shorter side is continued as it ends, to a square."""

    def target(self, height: int, width: int) -> tuple[int, int]:
        """A square of the longer side."""
        side: Any = torch.sym_max(height, width)
        return side, side

    def along_rows(self, image: Tensor, target: int) -> Tensor:
        """Pad the rows of (N, H, W) to (N, target, W)."""
        length = image.shape[1]
        source = torch.arange(target, device=image.device) - (target - length) // 2
        return image.index_select(1, _within(source, length))


class FixedResize(Transform):  # type: ignore[misc]
    """Any ``Resize`` of torchvision for images of one size: what it makes of rows and columns becomes the weights.

    Args:
        resize: The transform.
        size: Height and width of the images.
    """

    def __init__(self, resize: Resize, size: tuple[int, int]) -> None:
        super().__init__()
        self.resized: tuple[int, int] = tuple(resize(torch.zeros(1, 1, *size)).shape[-2:])
        arguments: dict[str, Any] = {"interpolation": resize.interpolation, "antialias": resize.antialias}
        for name, length, target in zip(("rows", "columns"), size, self.resized, strict=True):
            along = Resize((1, target), **arguments)
            weights = along(torch.eye(length, dtype=torch.float64)[:, None, None]).reshape(length, target).T
            source, bands = _bands_of(weights.float())
            self.register_buffer(f"{name}_source", source, persistent=False)
            self.register_buffer(f"{name}_weights", bands, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Resize (B, C, H, W)."""
        resized = image.flatten(end_dim=-3)
        for name, target in zip(("rows", "columns"), self.resized, strict=True):
            source, weights = getattr(self, f"{name}_source"), getattr(self, f"{name}_weights")
            resized = resize_by_bands(resized, source, weights.to(image.dtype), target).mT
        return resized.reshape(*image.shape[:-2], *self.resized)


def _bands_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cut weights of each source position for each target position, (target, length), into bands, by what is not 0."""
    target, length = weights.shape
    bands = torch.cat([weights, weights[-1:].expand(-target % BAND, -1)]).reshape(-1, BAND, length)
    used = bands.ne(0).any(dim=1)
    first = used.int().argmax(dim=1)
    count = int((length - used.flip(1).int().argmax(dim=1) - first).max())
    source = first.clamp(max=length - count).unsqueeze(1) + torch.arange(count)
    return source, bands.gather(2, source.unsqueeze(1).expand(-1, BAND, -1))


def _within(source: Tensor, length: int) -> Tensor:
    """The nearest positions that there are; the length may be symbolic."""
    return torch.minimum(source.clamp(min=0), torch.full((), length - 1, device=source.device))


def is_antialiased(resize: Resize) -> bool:
    """Whether a resize weighs all pixels that a target position covers, by a kernel that is known here."""
    kernels = {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}
    return bool(resize.antialias) and InterpolationMode(resize.interpolation) in kernels
