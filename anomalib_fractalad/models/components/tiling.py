# SPDX-License-Identifier: Apache-2.0
"""Large images, tile by tile, with anomalib's tiler."""

import copy
from collections.abc import Callable

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from torch import Tensor, nn


class TileByTile(nn.Module):
    """Predict maps of large images as many tiles at a time as there are images, so that memory hardly grows."""

    def forward(self, predict: Callable[[Tensor], Tensor], images: Tensor, tiler: Tiler | None) -> Tensor:
        """Predict maps of images.

        Args:
            predict: Predicts maps (B, 1, h, w) of images (B, 3, h, w).
            images: (B, 3, H, W), values in [0, 1].
            tiler: Cuts the images and joins the maps, the mean where tiles overlap; without it images are predicted
                whole.

        Returns:
            (B, 1, H, W).

        Raises:
            ValueError: If the images are smaller than a tile.
        """
        if tiler is None:
            return predict(images)
        tiler = copy.copy(tiler)  # it remembers what it tiles
        return tiler.untile(self.predict_tiles(predict, tiler.tile(images), images.shape[0]))

    def predict_tiles(self, predict: Callable[[Tensor], Tensor], tiles: Tensor, at_once: int) -> Tensor:
        """Predict maps of all tiles.

        Args:
            predict: Predicts maps of tiles.
            tiles: (N, 3, h, w).
            at_once: Number of tiles to predict at a time.

        Returns:
            (N, 1, h, w).
        """
        return torch.cat([predict(batch) for batch in torch.split(tiles, at_once)])


def tiler_settings(tiler: Tiler) -> dict[str, object]:
    """What a tiler has to be made with to be the same, as plain data.

    Args:
        tiler: A tiler.

    Returns:
        Arguments of :class:`anomalib.data.utils.tiler.Tiler`.
    """
    return {
        "tile_size": [tiler.tile_size_h, tiler.tile_size_w],
        "stride": [tiler.stride_h, tiler.stride_w],
        "remove_border_count": tiler.remove_border_count,
        "mode": tiler.mode.value,
    }


def make_tiler(tile_size: list[int], stride: list[int], remove_border_count: int, mode: str) -> Tiler:
    """Make a tiler from its settings.

    Args:
        tile_size: Height and width.
        stride: Rows and columns.
        remove_border_count: Pixels left out at the borders of each tile.
        mode: How images are made large enough for a whole number of tiles: ``padding`` or ``interpolation``.

    Returns:
        The tiler.
    """
    return Tiler(tile_size, stride, remove_border_count, ImageUpscaleMode(mode))
