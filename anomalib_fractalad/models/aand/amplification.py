# SPDX-License-Identifier: Apache-2.0
"""Stage I of AAND: a residual that moves the teacher's features where they are anomalous."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import at_least_float32

MEMORY_ITEMS = 50  # for normal and as many for anomalous positions
TEMPERATURE = 0.2


class ResidualAnomalyAmplification(nn.Module):
    """Add a gated residual to the features of one stage: F + gate x residual.

    AAND (arXiv 2405.02068), section III-B.

    Args:
        channels: Channels of the features.
        width: Channels of the hidden layers; left out, the published min(2 x channels, 1024).
    """

    def __init__(self, channels: int, width: int | None = None) -> None:
        super().__init__()
        self.gate = MatchingGate(channels, width)
        self.generator = ResidualGenerator(channels, width)

    def forward(self, features: Tensor) -> Tensor:
        """Amplify anomalous positions, found by the gate.

        Args:
            features: (B, C, H, W).

        Returns:
            Advanced features, (B, C, H, W).
        """
        gate = self.gate(features).sigmoid().to(features.dtype)
        advanced: Tensor = features + gate * self.generator(features)
        return advanced


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


class ResidualGenerator(nn.Module):
    """Attribute-scaling residual generator: the features, each channel scaled by a factor in (-1, 1).

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
