# SPDX-License-Identifier: Apache-2.0
"""Antialiased resizing that ONNX Runtime and OpenVINO compute as torch does."""

import copy

import torch
from torch import Tensor
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform


class AntialiasedResize(Transform):  # type: ignore[misc]
    """torchvision's bilinear ``Resize`` with antialiasing, written as two matrix products.

    anomalib switches antialiasing off for export, and OpenVINO ignores it in ONNX's ``Resize``, so that an image that
    is shrunk scores differently in the lab and on the line. Matrix products are the same everywhere.

    Args:
        size: Height and width.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Resize.

        Args:
            image: (B, C, H, W), floating point.

        Returns:
            (B, C, *size).
        """
        rows = triangle_filter(image.shape[-2], self.size[0], image)
        columns = triangle_filter(image.shape[-1], self.size[1], image)
        # One axis for batch and channels: OpenVINO fuses what follows a product into it, and takes the wrong axis for
        # the channels where it follows directly.
        resized = rows @ image.flatten(end_dim=-3) @ columns.T
        return resized.reshape(*image.shape[:-2], *self.size)


def triangle_filter(length: int, target: int, like: Tensor) -> Tensor:
    """Weights of each source position for each target position.

    Args:
        length: Number of source positions.
        target: Number of target positions.
        like: A tensor of the device and dtype to use.

    Returns:
        (target, length), rows sum to 1.
    """
    # Whole numbers up to the last step: OpenVINO may compute in bfloat16, which cannot hold positions beyond 256.
    position = (2 * torch.arange(length, device=like.device) + 1) * target
    center = ((2 * torch.arange(target, device=like.device) + 1) * length).unsqueeze(1)
    weights = (2 * max(length, target) - (position - center).abs()).clamp(min=0).to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def keep_antialiasing(transform: Transform | None) -> Transform | None:
    """Replace antialiased resizes by :class:`AntialiasedResize`, for export.

    Args:
        transform: A transform, or several in a ``Compose``.

    Returns:
        A copy with resizes replaced, where they resize to height and width bilinearly.
    """
    if isinstance(transform, Compose):
        return Compose([keep_antialiasing(step) for step in transform.transforms])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and InterpolationMode(transform.interpolation) is InterpolationMode.BILINEAR
        and transform.size is not None
        and len(transform.size) == 2
    ):
        return AntialiasedResize((transform.size[0], transform.size[1]))
    return copy.deepcopy(transform)
