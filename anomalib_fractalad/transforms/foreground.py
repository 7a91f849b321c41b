# SPDX-License-Identifier: Apache-2.0
"""Foreground of images that show one object on a plain background."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad
from torchvision.transforms.v2.functional import rgb_to_grayscale


def object_mask(
    images: Tensor,
    size: int = 256,
    kernel_size: int = 5,
    corner: int = 20,
    darker: int = 50,
    brighter: int = 10,
) -> Tensor:
    """Tell the object from its background by its gray level (FractalAD's object mode).

    The background's level ``m`` is the mean of the top left corner. On a bright background, ``m > 128``, the object is
    what is at most ``m - darker``; on a dark one what is above ``m + brighter``. Levels are those of 8-bit images.

    Args:
        images: Images ``(B, C, H, W)`` with 1 or 3 channels, values in [0, 1].
        size: Side in pixels of the square image that the decision is made on.
        kernel_size: Side in pixels of the mean filter before and of the median filter after the decision.
        corner: Side in pixels, out of ``size``, of the corner that shows the background.
        darker: Least difference in level of an object on a bright background.
        brighter: Difference in level that an object on a dark background must exceed.

    Returns:
        Boolean masks ``(B, 1, H, W)``, true on the object.
    """
    # Of other strides, the last digits differ, which in bfloat16 is a level or two, and with them what is rounded.
    images = images.float().contiguous()
    gray = rgb_to_grayscale(images) if images.shape[1] == 3 else images
    gray = interpolate(gray, (size, size), mode="bilinear", align_corners=False)
    levels = _box_filter((255 * gray).round(), kernel_size, "reflect").round()
    background = levels[..., :corner, :corner].mean(dim=(-2, -1), keepdim=True).floor()
    is_object = torch.where(background > 128, levels <= background - darker, levels > background + brighter)
    # The median of binary values is their majority.
    is_object = _box_filter(is_object.float(), kernel_size, "replicate") > 0.5
    return interpolate(is_object.float(), images.shape[-2:], mode="nearest-exact").bool()


def _box_filter(images: Tensor, kernel_size: int, border: str) -> Tensor:
    return avg_pool2d(pad(images, (kernel_size // 2,) * 4, mode=border), kernel_size, stride=1)


def shorter_side(masks: Tensor) -> Tensor:
    """Measure the largest connected part of each mask, on the CPU.

    Args:
        masks: Boolean masks ``(B, 1, H, W)``.

    Returns:
        Shorter side in pixels ``(B,)`` of the rectangle of minimum area, at any angle, around the pixel centers of the
        largest connected component; 0 where a mask is empty.
    """
    sides = [_shorter_side(mask) for mask in masks.squeeze(1).to("cpu", torch.uint8).numpy()]
    return torch.tensor(sides, device=masks.device)


def _shorter_side(mask: npt.NDArray[Any]) -> float:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    if not areas.size:
        return 0.0
    rows, columns = np.nonzero(labels == 1 + areas.argmax())
    _, sides, _ = cv2.minAreaRect(np.stack([columns, rows], axis=1).astype(np.int32))
    return min(sides)


def sample_centers(masks: Tensor, side: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Draw pixels of the masks around which squares of the given sides lie inside the image.

    Args:
        masks: Boolean masks ``(B, H, W)``.
        side: Sides ``(B,)`` of the squares.
        shares: Uniform random numbers ``(2, B)``.

    Returns:
        Two pixels ``(2, B, 2)`` for each mask, and whether there are any ``(B,)``, both on the masks' device.
    """
    height, width = masks.shape[-2:]
    side, shares = (values.to(masks.device, non_blocking=True) for values in (side, shares))
    before = side[:, None] // 2
    after = side[:, None] - before
    rows = torch.arange(height, device=masks.device)
    columns = torch.arange(width, device=masks.device)
    rows_fit = (rows >= before) & (rows <= height - after)
    columns_fit = (columns >= before) & (columns <= width - after)
    cumulative = (masks & rows_fit[:, :, None] & columns_fit[:, None]).flatten(1).cumsum(1)
    count = cumulative[:, -1:]
    wanted = (shares.T * count).long().clamp(max=count - 1) + 1
    pixel = torch.searchsorted(cumulative, wanted.contiguous()).clamp(max=height * width - 1).T
    return torch.stack([pixel // width, pixel % width], dim=-1), (count > 0).squeeze(1)


def foreground_mask(images: Tensor, spread: float = 0.06, reach: int = 9) -> Tensor:
    """Tell what stands out from a plain border; where the border is not plain, everything is foreground.

    Args:
        images: Images ``(B, C, H, W)``, values in [0, 1].
        spread: Largest mean absolute deviation, from its median, of a border that counts as plain.
        reach: Odd number of pixels; the foreground is dilated by squares of this side.

    Returns:
        Boolean masks ``(B, 1, H, W)``; never empty.
    """
    border = torch.cat([images[..., :4, :], images[..., -4:, :], images[..., :4].mT, images[..., -4:].mT], dim=-1)
    level = border.flatten(2).median(dim=2).values[..., None, None]
    deviation = (border - level).abs().mean(dim=(1, 2, 3))[:, None, None, None]
    distance = (images - level).abs().mean(dim=1, keepdim=True)
    mask = (distance > 2 * deviation + spread).to(images.dtype)
    rows = max_pool2d(mask, (1, reach), stride=1, padding=(0, reach // 2))
    mask = max_pool2d(rows, (reach, 1), stride=1, padding=(reach // 2, 0)) > 0
    everything = (deviation > spread) | (mask.float().mean(dim=(1, 2, 3), keepdim=True) < 0.02)
    return mask | everything
