# SPDX-License-Identifier: Apache-2.0
"""Foreground of pictures that show one object on a plain background."""

import math

import torch
from kornia.contrib import connected_components_union_find
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad
from torchvision.transforms.v2.functional import rgb_to_grayscale


def object_mask(
    images: Tensor,
    size: int = 256,
    kernel_size: int = 5,
    corner: int = 20,
    darker: int = 50,
    brighter: int = 10,
) -> Tensor:
    """Tell the object from its background by its grey level (FractalAD's object mode).

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
    gray = rgb_to_grayscale(images) if images.shape[1] == 3 else images
    gray = interpolate(gray.float(), (size, size), mode="bilinear", align_corners=False)
    levels = _box_filter((255 * gray).round(), kernel_size, "reflect").round()
    background = levels[..., :corner, :corner].mean(dim=(-2, -1), keepdim=True).floor()
    is_object = torch.where(background > 128, levels <= background - darker, levels > background + brighter)
    # The median of binary values is their majority.
    is_object = _box_filter(is_object.float(), kernel_size, "replicate") > 0.5
    return interpolate(is_object.float(), images.shape[-2:], mode="nearest-exact").bool()


def _box_filter(images: Tensor, kernel_size: int, border: str) -> Tensor:
    return avg_pool2d(pad(images, (kernel_size // 2,) * 4, mode=border), kernel_size, stride=1)


def shorter_side(masks: Tensor, angles: int = 180) -> Tensor:
    """Measure the largest connected part of each mask.

    Args:
        masks: Boolean masks ``(B, 1, H, W)``.
        angles: Number of directions, out of a quarter turn, that the rectangle is tried in.

    Returns:
        Shorter side in pixels ``(B,)`` of the rectangle of minimum area, at any angle, around the pixel centers of the
        largest connected component; 0 where a mask is empty.
    """
    component = _largest_component(masks).squeeze(1)
    present = component.any(-1)
    columns = torch.arange(component.shape[-1], device=masks.device).expand_as(component)
    # The ends of its rows hold all corners of a component's convex hull.
    first = columns.masked_fill(~component, component.shape[-1]).amin(-1)
    last = columns.masked_fill(~component, -1).amax(-1)
    rows = torch.arange(component.shape[-2], device=masks.device).expand_as(first)
    x, y = torch.cat([first, last], dim=1).float(), torch.cat([rows, rows], dim=1).float()
    angle = torch.arange(angles, device=masks.device) * (math.pi / 2 / angles)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    outside = ~torch.cat([present, present], dim=1).unsqueeze(1)

    def width(position: Tensor) -> Tensor:
        lowest = position.masked_fill(outside, math.inf).amin(-1)
        return (position.masked_fill(outside, -math.inf).amax(-1) - lowest).clamp(min=0)

    x, y = x.unsqueeze(1), y.unsqueeze(1)
    sides = torch.stack([width(cos * x + sin * y), width(cos * y - sin * x)], dim=-1)
    best = sides.prod(-1).argmin(1)
    return sides[torch.arange(len(sides), device=masks.device), best].amin(-1)


def _largest_component(masks: Tensor) -> Tensor:
    labels = connected_components_union_find(masks)
    sizes = labels.flatten().bincount()
    sizes[0] = 0
    area = sizes[labels]
    largest = area.amax(dim=(-3, -2, -1), keepdim=True)
    # Of several parts of the same size the first one counts.
    label = labels.masked_fill(area < largest, labels.max() + 1).amin(dim=(-3, -2, -1), keepdim=True)
    return (labels == label) & (largest > 0)
