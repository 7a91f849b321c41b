# SPDX-License-Identifier: Apache-2.0
"""Patches of fractal shape: cutting them out of images and pasting them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .parameters import FractalParameters


def cut_out(shapes: Tensor, parameters: FractalParameters, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut flipped and rotated patches out in the given shapes.

    Args:
        shapes: Boolean shapes ``(B, S, S)``; a smaller patch lies in the top left corner.
        parameters: The images' parameters.
        size: Height and width of the images.

    Returns:
        Which pixels of the patch are pasted, ``(B, 1, S, S)``, boolean, and the flat index of the image's pixel that
        each of them comes from, ``(B, 1, S, S)``.
    """
    active, side = parameters.active[:, None, None], parameters.side[:, None, None]
    center = side / 2
    position = torch.arange(shapes.shape[-1], device=shapes.device)
    y, x = position[:, None] + 0.5 - center, position + 0.5 - center
    # Back from the pasted pixel to the original one: against the rotation, then the flips.
    angle = parameters.angle[:, None, None].deg2rad()
    cos, sin = angle.cos(), angle.sin()
    mirror_y, mirror_x = (1.0 - 2.0 * parameters.flip)[:, :, None, None].unbind(1)
    original_y = mirror_y * cos * y + mirror_y * sin * x
    original_x = mirror_x * cos * x - mirror_x * sin * y
    pasted = shapes & active & (torch.maximum(original_y.abs(), original_x.abs()) < center)
    # Where nothing is left, the patch's center is: a mask is never empty.
    lost = active & ~pasted.flatten(1).any(1)[:, None, None]
    pasted = pasted | (lost & (position[:, None] == side // 2) & (position == side // 2))

    top, left = parameters.source[..., None, None].unbind(1)
    row = (top + (original_y + center).long()).clamp(0, size[0] - 1)
    column = (left + (original_x + center).long()).clamp(0, size[1] - 1)
    return pasted.unsqueeze(1), (row * size[1] + column).unsqueeze(1)


def paste(images: Tensor, patches: Tensor, pasted: Tensor, corner: Tensor) -> Tensor:
    """Paste the chosen pixels of patches into images.

    Args:
        images: Images ``(B, C, H, W)``.
        patches: Patches ``(B, C, S, S)``.
        pasted: Which of their pixels are pasted, ``(B, 1, S, S)``, boolean.
        corner: Row and column of the top left corners, ``(B, 2)``.

    Returns:
        Images ``(B, C, H, W)``.
    """
    height, width = images.shape[-2:]
    reach = patches.shape[-1]
    # A smaller patch's empty border may stick out.
    canvas = pad(images, (0, reach, 0, reach)).flatten(2)
    offset = torch.arange(reach, device=images.device)
    row, column = (corner[..., None] + offset).unbind(1)
    index = (row[:, :, None] * (width + reach) + column[:, None]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
    canvas.scatter_(2, index, torch.where(pasted.flatten(2), patches.flatten(2), canvas.gather(2, index)))
    return canvas.view(*images.shape[:2], height + reach, width + reach)[..., :height, :width]
