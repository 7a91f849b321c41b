# SPDX-License-Identifier: Apache-2.0
"""From an anomaly map to the score of its image."""

import math
from typing import Literal, get_args

from torch import Tensor, nn

from .arguments import is_finite
from .region import RegionOfInterest

Reduction = Literal["mean", "max", "top"]


class ImageScore(nn.Module):
    """Score of an image from its anomaly map.

    Args:
        reduction: ``mean`` of all pixels, ``max`` of all pixels, or ``top``: mean of the highest pixels.
        top_share: Share of the pixels, in (0, 1], that ``top`` takes.

    Raises:
        ValueError: If ``reduction`` is unknown or ``top_share`` is out of range.
    """

    def __init__(self, reduction: Reduction = "mean", top_share: float = 0.005) -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            msg = f"image score {reduction!r} is unknown; use one of {', '.join(get_args(Reduction))}"
            raise ValueError(msg)
        if not is_finite(top_share) or not 0 < top_share <= 1:
            msg = (
                f"top_share is {top_share!r}; it must be above 0 and at most 1 (0.005 is half a percent of the pixels)"
            )
            raise ValueError(msg)
        self.reduction = reduction
        self.top_share = top_share

    def forward(self, anomaly_map: Tensor, region: RegionOfInterest | None = None) -> Tensor:
        """Reduce maps to scores.

        Args:
            anomaly_map: (B, 1, H, W), values at least 0 where there is a region.
            region: What counts of them, of the same size; left out, all does.

        Returns:
            (B,).
        """
        pixels = (anomaly_map if region is None else region.lower(anomaly_map)).flatten(1)
        size = pixels.shape[1] if region is None else region.pixel_count
        if self.reduction == "mean":
            return pixels.mean(dim=1) if region is None else pixels.sum(dim=1) / size
        if self.reduction == "max":
            return pixels.amax(dim=1)
        count = math.ceil(self.top_share * size)
        return pixels.topk(count, dim=1).values.mean(dim=1)
