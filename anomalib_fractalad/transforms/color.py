# SPDX-License-Identifier: Apache-2.0
"""Brightness, contrast, saturation and hue of a batch, each image with factors of its own."""

import math
from collections.abc import Callable, Sequence

import torch
from kornia.enhance import adjust_hue
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jitter(images: Tensor, factors: Tensor, order: Sequence[int], mean_gray: Callable[[Tensor], Tensor]) -> Tensor:
    """Change brightness, contrast, saturation and hue in the given order.

    Args:
        images: Images ``(B, C, H, W)`` with 1 or 3 channels, values in [0, 1]; of 1 channel the hue stays.
        factors: Factors ``(B, 4)`` of brightness, contrast and saturation, and the turn of the hue in turns.
        order: The changes to make, each of them an index of ``factors``.
        mean_gray: Makes the gray level ``(B, 1, 1, 1)`` that contrast is changed about from the gray images.

    Returns:
        Images of the same shape, values in [0, 1].
    """
    for change in order:
        factor = factors[:, change, None, None, None].to(images.dtype)
        if change == BRIGHTNESS:
            images = (images * factor).clamp(0, 1)
        elif change == CONTRAST:
            images = torch.lerp(mean_gray(rgb_to_grayscale(images)), images, factor).clamp(0, 1)
        elif change == SATURATION:
            images = torch.lerp(rgb_to_grayscale(images), images, factor).clamp(0, 1)
        elif images.shape[1] == 3:
            images = adjust_hue(images, 2 * math.pi * factor)
    return images
