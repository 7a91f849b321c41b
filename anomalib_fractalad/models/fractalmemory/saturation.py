# SPDX-License-Identifier: Apache-2.0
"""How much a level's distance can count in the map."""

import torch
from torch import Tensor, nn

from anomalib_fractalad.models.components import check_not_negative


class Saturation(nn.Module):
    """Adds the levels' distances up, and bounds what each counts beyond the usual.

    Without bounds, the surroundings of a strong defect come to more than a weak one does.

    Args:
        levels: Number of levels.
        strength: How early a level saturates: it adds at most ``spread / strength`` to what is usual. At 0, none does.

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
        """Add distances up.

        Args:
            distances: Of each level, (B, S, H, W), from 0 on.

        Returns:
            (B, 1, H, W), from 0 on: their sum, where none is beyond the usual.
        """
        if self.strength:
            usual, reach = self.usual[:, None, None], self.spread[:, None, None] / self.strength
            distances = usual + reach * torch.tanh((distances - usual) / reach)
        return distances.sum(dim=1, keepdim=True)
