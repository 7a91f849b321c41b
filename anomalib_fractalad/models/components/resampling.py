# SPDX-License-Identifier: Apache-2.0
"""Resampling of maps by matrices."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def resample(maps: Tensor, size: Sequence[int], along: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Resample maps, in the same way along rows and along columns, by two matrix products in full precision.

    What comes from OpenVINO's interpolations and convolutions has its channels last. With one channel, all further work
    on such a map is done pixel by pixel, a hundred times slower than on rows.

    Args:
        maps: (B, 1, h, w).
        size: Height and width.
        along: Resamples rows (N, n) to a length, (N, length); linear.

    Returns:
        (B, 1, *size).
    """
    with torch.autocast(maps.device.type, enabled=False):
        rows, columns = (
            along(torch.eye(short, dtype=maps.dtype, device=maps.device), long)
            for short, long in zip(maps.shape[-2:], size, strict=True)
        )
        # Constants stand on the right: OpenVINO refuses what NNCF makes of them on the left.
        return ((maps.squeeze(1) @ columns).mT @ rows).mT.unsqueeze(1)
