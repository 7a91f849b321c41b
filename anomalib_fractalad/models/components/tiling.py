# SPDX-License-Identifier: Apache-2.0
"""Large images, tile by tile, with anomalib's tiler."""

import copy
from collections.abc import Callable

import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from torch import Tensor


def predict_by_tiles(predict: Callable[[Tensor], Tensor], images: Tensor, tiler: Tiler | None) -> Tensor:
    """Predict maps of images, as many tiles at a time as there are images, so that memory hardly grows with their size.

    An exported model takes all tiles at once.

    Args:
        predict: Predicts maps (B, 1, h, w) of images (B, 3, h, w).
        images: (B, 3, H, W), values in [0, 1].
        tiler: Cuts the images and joins the maps, the mean where tiles overlap; without it images are predicted whole.

    Returns:
        (B, 1, H, W).

    Raises:
        ValueError: If the images are smaller than a tile.
    """
    if tiler is None:
        return predict(images)
    tiler = copy.copy(tiler)  # it remembers what it tiles, which would become part of an export
    tiles = tiler.tile(images)
    # An exported graph would hold the network once for each tile.
    batches = [tiles] if torch.compiler.is_compiling() else torch.split(tiles, len(images))
    return tiler.untile(torch.cat([predict(batch) for batch in batches]))


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
