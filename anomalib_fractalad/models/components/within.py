# SPDX-License-Identifier: Apache-2.0
"""Anomalies that stay within a part of the image."""

import torch
from torch import Tensor

from .generator import AnomalyGenerator

REDRAWS = 10


def anomalies_within(foreground: Tensor, images: Tensor, generator: AnomalyGenerator) -> tuple[Tensor, Tensor]:
    """Make anomalies that stay within a foreground.

    Anomalies that miss it are drawn anew, up to ten times; then the image stays normal.

    Args:
        foreground: (B, 1, H, W), true on the foreground.
        images: (B, C, H, W), values in [0, 1].
        generator: Makes the anomalies.

    Returns:
        The images with anomalies, (B, C, H, W), and their masks, (B, 1, H, W), true or false.
    """
    anomalous, mask = generator(images)
    drawn = mask.flatten(1).any(dim=1)
    inside = (mask > 0) & foreground
    for _ in range(REDRAWS):
        missed = drawn & ~inside.flatten(1).any(dim=1)
        if not missed.any():
            break
        anomalous[missed], redrawn = generator(images[missed])
        inside[missed] = (redrawn > 0) & foreground[missed]
    return torch.where(foreground, anomalous, images), inside
