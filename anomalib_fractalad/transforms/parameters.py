# SPDX-License-Identifier: Apache-2.0
"""The random numbers that describe a batch of fractal anomalies."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FractalParameters:
    """The random numbers of a batch of ``B`` images, a row an image.

    Attributes:
        active: Whether an image gets an anomaly, ``(B,)``, boolean.
        side: Side of the patch in pixels, ``(B,)``.
        source: Top left corner, row and column in pixels, of where the patch is taken from, ``(B, 2)``.
        target: Top left corner of where the patch is pasted to, ``(B, 2)``.
        color: Which recoloring, 0 to 2: slight jitter, strong jitter or channel gain, ``(B,)``.
        factors: Factors of brightness, contrast and saturation, and the turn of the hue in turns, ``(B, 4)``. Without
            effect are 1, 1, 1 and 0.
        order: In which order the four are changed throughout the batch, ``(4,)``: the only one that is no row an image.
        channels: Channels that are amplified one after the other, ``(B, 2)``.
        gains: Their gains, ``(B, 2)``.
        flip: Whether the patch is flipped top-bottom and left-right, ``(B, 2)``, boolean.
        angle: Counterclockwise rotation in degrees, ``(B,)``.
        systems: Iterated function systems, ``(B, maps, 2, 3)``.
        stamps: Pattern that is set around each point of an attractor, ``(B, 3, 3)``, boolean.
        noisy: Whether noise is added inside the mask, ``(B,)``, boolean.
        jitter: Like ``factors``, of the jitter of :meth:`FractalAnomalyGenerator.augment`, ``(B, 4)``.
        noise: Noise, ``(B, 1, H, W)``.
    """

    active: Tensor
    side: Tensor
    source: Tensor
    target: Tensor
    color: Tensor
    factors: Tensor
    order: Tensor
    channels: Tensor
    gains: Tensor
    flip: Tensor
    angle: Tensor
    systems: Tensor
    stamps: Tensor
    noisy: Tensor
    jitter: Tensor
    noise: Tensor

    def to(self, device: torch.device | str) -> "FractalParameters":
        """Copy to a device, without waiting for it."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return FractalParameters(**{name: each.to(device, non_blocking=True) for name, each in tensors.items()})
