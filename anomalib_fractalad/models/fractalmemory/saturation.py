# SPDX-License-Identifier: Apache-2.0
"""How much a level's distance can count in the map."""

import torch
from torch import Tensor, nn

from anomalib_fractalad.models.components import check_not_negative

FULL = 0.95  # what full agreement comes to before it is stretched, which at 1 would have no end


class Saturation(nn.Module):
    """A bounded mean of the levels' distances: how much the levels agree that a place is farther than usual.

    Without bounds, the surroundings of a strong defect come to more than a weak defect does.

    Args:
        levels: Number of levels.
        strength: How early a level saturates: ``spread / strength`` beyond the usual, it is three quarters of the way.
            At 0, levels do not saturate, and there is no agreement.

    Attributes:
        usual: Median of each level's distance over normal places, (S,).
        spread: Range of each level's distance over normal places, from the median to the 99.5 % quantile, (S,).

    Raises:
        ValueError: If the strength is below 0 or infinite.
    """

    usual: Tensor
    spread: Tensor

    def __init__(self, levels: int, strength: float = 1.0) -> None:
        super().__init__()
        check_not_negative(saturation=strength)
        self.strength = strength
        self.register_buffer("usual", torch.zeros(levels))
        self.register_buffer("spread", torch.ones(levels))

    def forward(self, distances: Tensor) -> Tensor:
        """Measure agreement.

        Args:
            distances: Of each level, (B, S, H, W), from 0 on.

        Returns:
            (B, 1, H, W), above -1 and at most 1; 0 is usual.
        """
        spread = self.spread[:, None, None]
        saturated = torch.tanh(self.strength * (distances - self.usual[:, None, None]) / spread)
        return (spread * saturated).sum(dim=1, keepdim=True) / self.spread.sum()

    def excess(self, agreement: Tensor) -> Tensor:
        """Stretch agreement, nearly to the excess over the usual that all levels would have to have for it.

        Args:
            agreement: (B, 1, H, W), above -1 and at most 1.

        Returns:
            (B, 1, H, W) in the same order, in ranges of normal places: 0 is usual, 1.93 / strength is the most.
        """
        full = FULL * agreement
        # atanh, which OpenVINO computes with its slow reference
        return ((1 + full) / (1 - full)).log() / (2 * FULL * self.strength)
