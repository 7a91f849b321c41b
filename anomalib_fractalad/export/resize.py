# SPDX-License-Identifier: Apache-2.0
"""Resizing, cropping and padding that torch, ONNX Runtime and OpenVINO compute alike, for images of any size.

Each works along rows and along columns alike, and so is two matrix products. anomalib switches antialiasing off for
export, and OpenVINO ignores it in ONNX's ``Resize``, so that an image that is shrunk would score differently in the lab
and on the line. Matrix products are the same everywhere.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, Resize, Transform


class MatrixTransform(Transform):  # type: ignore[misc]
    """A transform of images by a matrix for the rows and one for the columns."""

    def forward(self, image: Tensor) -> Tensor:
        """Transform.

        Args:
            image: (B, C, H, W), floating point.

        Returns:
            (B, C, *self.target(H, W)).
        """
        height, width = image.shape[-2:]
        target = self.target(height, width)
        rows, columns = self.matrix(height, target[0], image), self.matrix(width, target[1], image)
        # One axis for batch and channels: OpenVINO fuses what follows a product into it, and takes the wrong axis for
        # the channels where it follows directly.
        transformed = rows @ image.flatten(end_dim=-3) @ columns.T
        return transformed.reshape(*image.shape[:-2], *target)

    @abstractmethod
    def target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what comes of an image; all arguments may be symbolic."""

    @abstractmethod
    def matrix(self, length: int, target: int, like: Tensor) -> Tensor:
        """Weights of each source position for each target position, (target, length)."""


class AntialiasedResize(MatrixTransform):
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

    def matrix(self, length: int, target: int, like: Tensor) -> Tensor:
        """Weights of each source position for each target position, (target, length); rows sum to 1."""
        # Whole numbers up to the last step: OpenVINO may compute in bfloat16, which cannot hold positions beyond 256.
        position = (2 * torch.arange(length, device=like.device) + 1) * target
        center = ((2 * torch.arange(target, device=like.device) + 1) * length).unsqueeze(1)
        reach: Any = 2 * torch.sym_max(length, target)
        distance = (position - center).abs()
        if self.cubic:
            weights = cubic_kernel(distance.to(like.dtype) / reach)
        else:
            weights = (reach - distance).clamp(min=0).to(like.dtype)
        return weights / weights.sum(dim=1, keepdim=True)


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


class MatrixCenterCrop(MatrixTransform):
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

    def matrix(self, length: int, target: int, like: Tensor) -> Tensor:
        """1 where a target position takes a source position, (target, length)."""
        surplus = torch.full((), length - target, device=like.device)
        half = surplus // 2
        # torchvision rounds half a pixel to the even number, and pads less on the left.
        start = torch.where(surplus >= 0, half + surplus % 2 * (half % 2), half + surplus % 2)
        source = torch.arange(target, device=like.device) + start
        return (source.unsqueeze(1) == torch.arange(length, device=like.device)).to(like.dtype)


class MatrixSquarePad(MatrixTransform):
    """anomalib's ``SquarePad``: the shorter side is continued as it ends, to a square."""

    def target(self, height: int, width: int) -> tuple[int, int]:
        """A square of the longer side."""
        side: Any = torch.sym_max(height, width)
        return side, side

    def matrix(self, length: int, target: int, like: Tensor) -> Tensor:
        """1 where a target position takes a source position, (target, length)."""
        source = torch.arange(target, device=like.device) - (target - length) // 2
        source = torch.minimum(source.clamp(min=0), torch.full((), length - 1, device=like.device))
        return (source.unsqueeze(1) == torch.arange(length, device=like.device)).to(like.dtype)


class FixedResize(MatrixTransform):
    """Any ``Resize`` of torchvision for images of one size: what it makes of rows and columns becomes the matrices.

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
            self.register_buffer(name, weights.float().contiguous(), persistent=False)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The one size."""
        del height, width
        return self.resized

    def matrix(self, length: int, target: int, like: Tensor) -> Tensor:
        """Weights of each source position for each target position, (target, length)."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Resize (B, C, H, W)."""
        rows, columns = self.rows.to(image.dtype), self.columns.to(image.dtype)
        transformed: Tensor = rows @ image.flatten(end_dim=-3) @ columns.T
        return transformed.reshape(*image.shape[:-2], *self.resized)


def is_antialiased(resize: Resize) -> bool:
    """Whether a resize weighs all pixels that a target position covers, by a kernel that is known here."""
    kernels = {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}
    return bool(resize.antialias) and InterpolationMode(resize.interpolation) in kernels
