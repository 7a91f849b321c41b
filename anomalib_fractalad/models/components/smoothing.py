# SPDX-License-Identifier: Apache-2.0
"""Smoothing of anomaly maps."""

import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor, nn


def gaussian_blur(sigma: float, padding: str = "same") -> nn.Sequential:
    """Anomalib's Gaussian filter along the height, then along the width: the same as both at once, and far faster.

    Args:
        sigma: Standard deviation in pixels.
        padding: ``same`` mirrors the map beyond its edges, edge pixels left out; ``valid`` crops it.

    Returns:
        A module from (B, 1, H, W) to (B, 1, H, W), or with ``valid`` to a smaller map.
    """
    length = compute_kernel_size(sigma)
    return nn.Sequential(
        GaussianBlur2d(sigma, kernel_size=(length, 1), padding=padding),
        GaussianBlur2d(sigma, kernel_size=(1, length), padding=padding),
    )


class GaussianSmoothing(nn.Module):
    """Gaussian filter; beyond its edges the map is mirrored, edge pixels included.

    Args:
        sigma: Standard deviation in pixels.
    """

    def __init__(self, sigma: int) -> None:
        super().__init__()
        self.radius = 4 * sigma
        self.blur = gaussian_blur(sigma, padding="valid")

    def forward(self, anomaly_map: Tensor) -> Tensor:
        """Smooth maps.

        Args:
            anomaly_map: (B, 1, H, W), H and W at least 4 sigma.

        Returns:
            (B, 1, H, W).
        """
        with torch.autocast(anomaly_map.device.type, enabled=False):
            return self.along_rows(self.along_rows(anomaly_map.mT).mT)

    def along_rows(self, anomaly_map: Tensor) -> Tensor:
        """Smooth along rows only.

        Args:
            anomaly_map: (B, 1, H, W), W at least 4 sigma.

        Returns:
            (B, 1, H, W).
        """
        before = anomaly_map.narrow(-1, 0, self.radius).flip(-1)
        after = anomaly_map.flip(-1).narrow(-1, 0, self.radius)
        smoothed: Tensor = self.blur[1](torch.cat([before, anomaly_map, after], dim=-1))
        return smoothed
