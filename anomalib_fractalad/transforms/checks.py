# SPDX-License-Identifier: Apache-2.0
"""Checks of a transform's images and arguments."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

MIN_IMAGE_SIZE = 32
# Resizing leaves values this far outside [0, 1].
ROUNDING = 1e-3


def checked_batch(image: Tensor) -> Tensor:
    """Check an image or a batch of them, without waiting for an accelerator.

    Args:
        image: Image ``(C, H, W)`` or batch ``(B, C, H, W)``.

    Returns:
        A batch ``(B, C, H, W)``, clamped to [0, 1]. On another device than the CPU it is NaN throughout where a value
        lies outside [0, 1] by more than rounding.

    Raises:
        TypeError: If ``image`` is a mask or is not of a floating-point type.
        ValueError: If the shape is wrong or a side is too short; on the CPU, if a value lies outside [0, 1].
    """
    if isinstance(image, tv_tensors.Mask):
        msg = "A mask was passed: anomalies are made in images."
        raise TypeError(msg)
    if not image.is_floating_point():
        msg = f"Images of dtype {image.dtype}: convert them to floating point with values in [0, 1]."
        raise TypeError(msg)
    if image.ndim not in {3, 4} or image.shape[-3] not in {1, 3} or image.numel() == 0:
        msg = f"Images of shape {tuple(image.shape)}: (C, H, W) or (B, C, H, W) with 1 or 3 channels is needed."
        raise ValueError(msg)
    if min(image.shape[-2:]) < MIN_IMAGE_SIZE:
        height, width = image.shape[-2:]
        msg = f"Images of {height} x {width} pixels: each side needs at least {MIN_IMAGE_SIZE}."
        raise ValueError(msg)
    batch = image.as_subclass(Tensor).reshape(-1, *image.shape[-3:])
    low, high = batch.aminmax()
    in_range = (low >= -ROUNDING) & (high <= 1 + ROUNDING)
    # To read the values of another device would wait for it.
    if image.device.type == "cpu" and not in_range:
        msg = (
            f"Image values from {low:.3g} to {high:.3g}: anomalies are made before normalization, with values in "
            "[0, 1]. Leave Normalize out of the pre-processor; the model normalizes by itself."
        )
        raise ValueError(msg)
    return torch.where(in_range, batch.clamp(0, 1), torch.nan)


def check_margin(margin: float, patch_size: tuple[float, float]) -> None:
    """Refuse a margin that leaves no room for the largest patch with a ValueError that names what works."""
    largest = (1 - patch_size[1]) / 2
    if not _is_finite(margin) or not 0 <= margin <= largest + 1e-9:
        msg = (
            f"position_margin={margin!r}: must lie in [0, {largest:g}], so that patches of up to {patch_size[1]:g} of "
            f"the image's shorter side fit between the margins (patch_size={tuple(patch_size)})."
        )
        if _is_finite(margin) and 0 <= margin < 0.5:
            msg += f" For this margin, patch_size must end at {1 - 2 * margin:g} or below."
        raise ValueError(msg)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is no number in [low, high] with a ValueError."""
    if not _is_finite(value) or not low <= value <= high:
        msg = f"{name}={value!r}: must lie in [{low:g}, {high:g}]."
        raise ValueError(msg)


def check_interval(name: str, interval: tuple[float, float], low: float, high: float) -> None:
    """Refuse what is no ascending pair of finite numbers in [low, high] with a ValueError."""
    is_pair = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_is_finite, interval))
    if not is_pair or not low <= interval[0] <= interval[1] <= high:
        msg = f"{name}={interval!r}: two ascending finite values in [{low:g}, {high:g}] are needed."
        raise ValueError(msg)


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number of at least ``least`` with a ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        msg = f"{name}={value!r}: must be a whole number of at least {least}."
        raise ValueError(msg)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
