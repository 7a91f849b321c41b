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


def jitter_alike(
    images: Tensor, anomalous: Tensor, masks: Tensor, factors: Tensor, order: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Give normal and anomalous images the same jitter, the contrast changed about the normal image's mean.

    Args:
        images: Normal images ``(B, C, H, W)``.
        anomalous: Anomalous images ``(B, C, H, W)``.
        masks: Masks ``(B, 1, H, W)``, above 0 where the two differ.
        factors: As in :func:`jitter`, on any device.
        order: As in :func:`jitter`.

    Returns:
        Normal and anomalous images ``(B, C, H, W)``, equal outside the masks.
    """
    count = len(images)
    both = jitter(
        single_precision(torch.cat([images, anomalous])),
        factors.to(images.device, non_blocking=True).repeat(2, 1),
        order,
        lambda gray: gray[:count].mean((-2, -1), keepdim=True).repeat(2, 1, 1, 1),
    ).to(images.dtype)
    normal, changed = both[:count], both[count:]
    return normal, torch.where(masks > 0, changed, normal)


def single_precision(images: Tensor) -> Tensor:
    """Images in single precision at least."""
    return images if images.dtype == torch.float64 else images.float()
