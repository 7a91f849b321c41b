# SPDX-License-Identifier: Apache-2.0
"""Stage I of AAND: a residual that moves the teacher's features where they are anomalous."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import at_least_float32

MEMORY_ITEMS = 50  # for normal and as many for anomalous positions
TEMPERATURE = 0.2
MASK_THRESHOLD = 0.3
NORMAL_POSITIONS = 5000
ANOMALOUS_POSITIONS = 1000


class ResidualAnomalyAmplification(nn.Module):
    """Add a gated residual to the features of one level: F + gate x residual.

    AAND (arXiv 2405.02068), section III-B.

    Args:
        channels: Channels of the features.
        width: Channels of the hidden layers; left out, the published min(2 x channels, 1024).
    """

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        self.gate = MatchingGate(channels, width)
        self.residual = ResidualScaling(channels, width)

    def compare(self, features: Tensor, mask: Tensor, foreground: Tensor) -> "AmplifiedLevel":
        """Find out what stage I's losses compare.

        Args:
            features: The teacher's features of anomalous images, (B, C, h, w).
            mask: Where the images are anomalous, (B, 1, H, W), true or false.
            foreground: What normal positions are drawn from, (B, 1, H, W), true or false.

        Returns:
            Positions of this level, drawn at random from the whole batch, and the gate of all.
        """
        is_anomalous = shrink_mask(mask, features)
        is_normal = shrink_mask(foreground, features) & ~is_anomalous
        gate = self.gate(features)
        normal = draw_positions(features, is_normal, NORMAL_POSITIONS)
        anomalous = draw_positions(features, is_anomalous, ANOMALOUS_POSITIONS)
        # The true mask stands in for the gate. It is 1 at these positions, and the loss sees no other residuals.
        amplified = anomalous + self.residual(anomalous[..., None, None]).flatten(1)
        return AmplifiedLevel(gate, is_anomalous, normal, anomalous, amplified)

    def forward(self, features: Tensor) -> Tensor:
        """Amplify anomalous positions, found by the gate.

        Args:
            features: (B, C, H, W).

        Returns:
            Advanced features, (B, C, H, W).
        """
        gate = self.gate(features).sigmoid().to(features.dtype)
        advanced: Tensor = features + gate * self.residual(features)
        return advanced

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Read older state dicts, too, which call the residual a generator."""
        older = f"{prefix}generator."
        for name in [name for name in state_dict if name.startswith(older)]:
            state_dict[f"{prefix}residual.{name.removeprefix(older)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AmplifiedLevel(NamedTuple):
    """What the losses of stage I compare at one level of features.

    Attributes:
        gate: Logits of the gate, (B, 1, h, w).
        mask: Which positions are anomalous, (B, 1, h, w), true or false.
        normal: Features of normal positions, (N, C).
        anomalous: Features of anomalous positions, (A, C).
        amplified: The same, with the residual added, (A, C).
    """

    gate: Tensor
    mask: Tensor
    normal: Tensor
    anomalous: Tensor
    amplified: Tensor


class MatchingGate(nn.Module):
    """Matching-guided residual gate: which half of a memory, normal or anomalous, a position resembles.

    The gate is the share of the anomalous half in the softmax of cosine(query, memory) / 0.2 over all items. It is
    given as a logit, for the sake of a stable loss.

    Args:
        channels: Channels of the features.
        width: Channels of the hidden layers; left out, the published min(2 x channels, 1024).

    Attributes:
        memory: (100, C): 50 normal and then 50 anomalous items.
    """

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        self.query = _pointwise_layers(channels, width)
        self.memory = nn.Parameter(torch.randn(2 * MEMORY_ITEMS, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Estimate which positions are anomalous.

        Args:
            features: (B, C, H, W).

        Returns:
            Logits of the gate, (B, 1, H, W), in float32 or wider.
        """
        query = F.normalize(self.query(features + position_code(features)), dim=1)
        memory = F.normalize(self.memory, dim=1)[..., None, None]
        similarity = at_least_float32(F.conv2d(query, memory.to(query.dtype))) / TEMPERATURE
        normal, anomalous = similarity.chunk(2, dim=1)
        return anomalous.logsumexp(dim=1, keepdim=True) - normal.logsumexp(dim=1, keepdim=True)


class ResidualScaling(nn.Module):
    """Attribute-scaling residual: the features, each channel scaled by a factor in (-1, 1).

    Args:
        channels: Channels of the features.
        width: Channels of the hidden layers; left out, the published min(2 x channels, 1024).
    """

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        self.scale = _pointwise_layers(channels, width)

    def forward(self, features: Tensor) -> Tensor:
        """Generate the residual.

        Args:
            features: (B, C, H, W).

        Returns:
            (B, C, H, W).
        """
        residual: Tensor = self.scale(features).tanh() * features
        return residual


def shrink_mask(mask: Tensor, features: Tensor) -> Tensor:
    """Bring a mask to the size of a level: true where more than 0.3 of the area is.

    Args:
        mask: (B, 1, H, W).
        features: (B, C, h, w).

    Returns:
        (B, 1, h, w), true or false.
    """
    return F.interpolate(mask.float(), size=features.shape[-2:], mode="area") > MASK_THRESHOLD


def draw_positions(features: Tensor, where: Tensor, count: int) -> Tensor:
    """Draw positions at random, at most ``count`` in the whole batch.

    Args:
        features: (B, C, H, W).
        where: Positions to draw from, (B, 1, H, W), true or false.
        count: Number of positions to draw.

    Returns:
        Features of the positions, (N, C).
    """
    positions = where.squeeze(1).nonzero()
    image, row, column = positions[torch.randperm(len(positions), device=positions.device)[:count]].T
    return features[image, :, row, column]


def position_code(features: Tensor) -> Tensor:
    """Fixed two-dimensional sinusoidal position code.

    Half of the channels hold the column, half the row, as alternating sines and cosines of falling frequency. Where the
    channels are no multiple of 4, it is the code of the next multiple, cut.

    Args:
        features: (B, C, H, W); only its shape, data type and device matter.

    Returns:
        (C, H, W), values in [-1, 1].
    """
    channels, height, width = features.shape[1:]
    dtype = torch.promote_types(features.dtype, torch.float32)
    frequencies = math.ceil(channels / 4)
    frequency = torch.arange(frequencies, device=features.device, dtype=dtype)
    frequency = (frequency * (-math.log(10000) / frequencies)).exp()

    def code(length: int) -> Tensor:
        angle = frequency[:, None] * torch.arange(length, device=features.device, dtype=dtype)
        return torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1)

    column = code(width)[:, None, :].expand(-1, height, -1)
    row = code(height)[:, :, None].expand(-1, -1, width)
    return torch.cat([column, row])[:channels].to(features.dtype)


def _pointwise_layers(channels: int, width: int | None) -> nn.Sequential:
    width = width or min(2 * channels, 1024)
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(width, width, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(width, channels, kernel_size=1),
    )
