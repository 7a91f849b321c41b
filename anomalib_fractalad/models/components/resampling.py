# SPDX-License-Identifier: Apache-2.0
"""Resampling of maps to the size of the image."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bring maps to a size bilinearly, as PyTorch's ``align_corners=False`` does.

    Args:
        maps: (B, C, h, w).
        size: Height and width.

    Returns:
        (B, C, *size).
    """
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class Upsample(nn.Module):
    """:func:`resize` to the size of the image, which an export computes in another way.

    Like every resampling here it treats rows and columns alike, one after the other; the export relies on that.
    """

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Bring maps to a size.

        Args:
            maps: (B, C, h, w).
            size: Height and width.

        Returns:
            (B, C, *size).
        """
        return resize(maps, size)


class AlignedUpsample(nn.Module):
    """Bring maps to the image's size, with their positions at chosen pixels.

    Args:
        stride: Position i lies at pixel stride x i, the center of its receptive field where convolutions pad evenly;
            left out, positions are stretched from border to border.
    """

    def __init__(self, stride: int | None = None) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Bring maps to a size; beyond the last position the map goes on as it ends.

        Args:
            maps: (B, C, h, w).
            size: Height and width, at least stride x (h - 1) + 1 and stride x (w - 1) + 1.

        Returns:
            (B, C, *size).
        """
        height, width = size if self.stride is None else (self.stride * (side - 1) + 1 for side in maps.shape[-2:])
        stretched = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=True)
        return F.pad(stretched, (0, size[1] - width, 0, size[0] - height), mode="replicate")
