# SPDX-License-Identifier: Apache-2.0
"""Smoothing of anomaly maps."""

from collections.abc import MutableMapping
from typing import Any

import torch
from anomalib.models.components.filters.blur import compute_kernel_size
from kornia.filters import GaussianBlur2d, filter2d, get_gaussian_kernel1d
from torch import Tensor, nn


def gaussian_blur(sigma: float) -> GaussianBlur2d:
    """Kornia's Gaussian filter, as long as anomalib's; beyond its edges the map is mirrored, edge pixels left out.

    Args:
        sigma: Standard deviation in pixels.

    Returns:
        A module from (B, 1, H, W) to (B, 1, H, W).
    """
    length = compute_kernel_size(sigma)
    blur = GaussianBlur2d((length, length), (sigma, sigma), separable=True)
    blur.register_load_state_dict_pre_hook(_forget_kernels)  # type: ignore[no-untyped-call]
    return blur


class GaussianSmoothing(nn.Module):
    """Gaussian filter; beyond its edges the map is mirrored, edge pixels included, as no border of kornia's does.

    Args:
        sigma: Standard deviation in pixels.
    """

    kernel: Tensor

    def __init__(self, sigma: int) -> None:
        super().__init__()
        self.radius = 4 * sigma
        kernel = get_gaussian_kernel1d(2 * self.radius + 1, float(sigma))
        self.register_buffer("kernel", kernel.unsqueeze(0), persistent=False)
        self.register_load_state_dict_pre_hook(_forget_kernels)  # type: ignore[no-untyped-call]

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
        smoothed: Tensor = filter2d(torch.cat([before, anomaly_map, after], dim=-1), self.kernel, padding="valid")
        return smoothed


def _forget_kernels(_module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Older checkpoints hold the kernels of anomalib's filter."""
    for name in [name for name in state_dict if name.startswith(prefix) and name.endswith(".kernel")]:
        del state_dict[name]
