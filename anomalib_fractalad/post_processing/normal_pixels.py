# SPDX-License-Identifier: Apache-2.0
"""A pixel threshold from normal images, for validation without masks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

_KEPT_BITS = 18  # sign, exponent and 9 bits of the mantissa: neighboring bins are 0.2 % apart
_DROPPED_BITS = 32 - _KEPT_BITS
_BINS = 1 << _KEPT_BITS
_ALL_BUT_SIGN = 0x7FFFFFFF


class NormalPixelThreshold(Metric):
    """The value that at most a given share of the pixels of normal images exceeds.

    Pixels are counted in bins of their leading bits, so memory does not grow with the number of images (2 MiB), and
    neither the order of the images nor their division among processes changes the result. A bin is 0.2 % wide,
    relative to its value, at any magnitude.

    Args:
        false_positive_rate: Share of the pixels that may exceed the threshold, above 0 and below 1.
    """

    full_state_update = False
    counts: Tensor
    defect_pixels: Tensor

    def __init__(self, false_positive_rate: float) -> None:
        super().__init__()
        self.false_positive_rate = false_positive_rate
        self.add_state("counts", torch.zeros(_BINS, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("defect_pixels", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, anomaly_map: Tensor, gt_label: Tensor | None, gt_mask: Tensor | None = None) -> None:
        """Count the pixels of the batch's normal images, and the defective pixels of its masks.

        Args:
            anomaly_map: Anomaly maps (B, ...).
            gt_label: Whether each image is anomalous (B,); without it, no pixel is known to be normal.
            gt_mask: Masks (B, ...), nonzero at defects, where there are any.
        """
        if gt_mask is not None:
            self.defect_pixels += torch.count_nonzero(gt_mask)
        if gt_label is not None:
            normal = anomaly_map.detach()[gt_label.flatten() == 0].float()
            self.counts += torch.bincount(_bins(normal.flatten()), minlength=_BINS)

    def compute(self) -> tuple[Tensor, bool]:
        """Threshold and whether any mask shows a defect, over all processes.

        Returns:
            The threshold, NaN where there was no normal image, and whether one of the masks has shown a defect.
        """
        below = self.counts.cpu().cumsum(0)
        pixels = int(below[-1])
        has_defects = bool(self.defect_pixels > 0)
        if not pixels:
            return torch.tensor(torch.nan), has_defects
        allowed = int(self.false_positive_rate * pixels)
        return _upper_edge(torch.searchsorted(below, pixels - allowed)), has_defects


class GoodPixelThreshold(NormalPixelThreshold):
    """The same by split conformal calibration: the ceil((m + 1)(1 - rate))-th smallest of m pixels, in its bin."""

    def compute(self) -> tuple[Tensor, int]:  # type: ignore[override]
        """Threshold and number of pixels, over all processes.

        Returns:
            The threshold, NaN where there are too few pixels for the rate, and the number of pixels.
        """
        below = self.counts.cpu().cumsum(0)
        pixels = int(below[-1])
        allowed = math.floor((pixels + 1) * self.false_positive_rate + 1e-9) - 1
        if allowed < 0:
            return torch.tensor(torch.nan), pixels
        return _upper_edge(torch.searchsorted(below, pixels - allowed)), pixels


def _bins(values: Tensor) -> Tensor:
    """Number of each value's bin; larger values have larger numbers.

    Args:
        values: (N,), float32.

    Returns:
        (N,), integers from 0 to `_BINS` - 1.
    """
    bits = values.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)
    return (ordered >> _DROPPED_BITS) + _BINS // 2


def _upper_edge(bin_number: Tensor) -> Tensor:
    """Largest value of a bin; zero for the bin of zero.

    Args:
        bin_number: An integer from 0 to `_BINS` - 1.

    Returns:
        A scalar, float32.
    """
    first = (bin_number.to(torch.int32) - _BINS // 2) << _DROPPED_BITS
    ordered = first | ((1 << _DROPPED_BITS) - 1)
    edge = torch.where(ordered < 0, ordered ^ _ALL_BUT_SIGN, ordered).view(torch.float32)
    return torch.where(edge.abs() < torch.finfo(torch.float32).tiny, 0.0, edge)
