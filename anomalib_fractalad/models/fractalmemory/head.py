# SPDX-License-Identifier: Apache-2.0
"""The head on the residual, and what it may add to the map."""

import torch
from torch import Tensor, nn

SOFTNESS = 2.0  # logits well beyond count no more


class ResidualHead(nn.Module):
    """A small segmentation network that sees the residual and the distance, and never the features themselves.

    Args:
        channels: Channels of the residual.
        width: Channels inside the head.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels + 1, width, kernel_size=1)
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=5, padding=2, groups=width),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, kernel_size=1),
        )
        self.enlarge = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        self.classify = nn.Sequential(
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, 1, kernel_size=1),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, residual: Tensor, distance: Tensor) -> Tensor:
        """Segment anomalies.

        Args:
            residual: (B, C, H, W).
            distance: (B, 1, H, W).

        Returns:
            Logits (B, 1, 2H, 2W).
        """
        # Relative to the image: one that is farther from the memory as a whole is not anomalous everywhere.
        typical = distance.mean(dim=(-2, -1), keepdim=True)
        # The root keeps single large channels from drowning the others.
        rooted = residual.sign() * (residual.abs() / (typical * residual.shape[1] ** 0.5)).sqrt()
        x = self.embed(torch.cat([rooted, distance / typical - 1], dim=1))
        x = x + self.spatial(x)
        logits: Tensor = self.classify(self.enlarge(x))
        return logits


class BoundedVote(nn.Module):
    """Adds what a logit says to a map, at most as much as a level that is saturated.

    Attributes:
        weight: What the logit counts, (); at 0, nothing.
    """

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(()))

    def forward(self, anomaly_map: Tensor, logit: Tensor, level: Tensor | float) -> Tensor:
        """Add a vote to a map.

        Args:
            anomaly_map: (B, 1, H, W).
            logit: (B, 1, H, W).
            level: What a level that is saturated adds to the map, a number or ().

        Returns:
            (B, 1, H, W), at least the map and at most the map + weight * level.
        """
        return anomaly_map + self.weight * level * torch.sigmoid(logit / SOFTNESS)
