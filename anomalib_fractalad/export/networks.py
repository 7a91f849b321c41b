# SPDX-License-Identifier: Apache-2.0
"""What an exported network does in another way than the trained one, to the same result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anomalib_fractalad.models.components.resampling import AlignedUpsample, Upsample
from anomalib_fractalad.models.components.smoothing import GaussianSmoothing
from anomalib_fractalad.models.components.tiling import TileByTile


class MatrixUpsample(nn.Module):
    """Bring maps to the image's size by two matrix products in full precision.

    What comes from OpenVINO's interpolations and convolutions has its channels last. With one channel, all further work
    on such a map is done pixel by pixel, a hundred times slower than on rows.

    Args:
        upsample: What it stands for, whose rows become the matrices.
        smooth: Smooths what comes of it, within the same products; left out, nothing does.
    """

    def __init__(self, upsample: nn.Module, smooth: GaussianSmoothing | None = None) -> None:
        super().__init__()
        self.upsample = upsample
        self.smooth = smooth

    def forward(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Bring maps to a size.

        Args:
            maps: (B, 1, h, w).
            size: Height and width.

        Returns:
            (B, 1, *size).
        """
        with torch.autocast(maps.device.type, enabled=False):
            rows, columns = (self._matrix(short, long, maps) for short, long in zip(maps.shape[-2:], size, strict=True))
            # Constants stand on the right: OpenVINO refuses what NNCF makes of them on the left.
            return ((maps.squeeze(1) @ columns).mT @ rows).mT.unsqueeze(1)

    def _matrix(self, short: int, long: int, like: Tensor) -> Tensor:
        positions = torch.eye(short, dtype=like.dtype, device=like.device)[:, None, None]
        pixels: Tensor = self.upsample(positions, (1, long))
        return (pixels if self.smooth is None else self.smooth.along_rows(pixels)).flatten(0, 2)


class AllTiles(TileByTile):
    """Predict maps of all tiles at once: the graph would hold the network once for each tile."""

    def predict_tiles(self, predict: Callable[[Tensor], Tensor], tiles: Tensor, at_once: int) -> Tensor:
        """Predict maps of all tiles.

        Args:
            predict: Predicts maps of tiles.
            tiles: (N, 3, h, w).
            at_once: Not used.

        Returns:
            (N, 1, h, w).
        """
        del at_once
        return predict(tiles)


@contextmanager
def exportable(network: nn.Module) -> Iterator[None]:
    """Give a network the modules that it is exported with, for the duration.

    Args:
        network: A network of this package; it comes back as it was.
    """
    kept = [(parent, name, child) for parent in network.modules() for name, child in parent.named_children()]
    smooth = getattr(network, "smooth", None)
    # Upsampling and smoothing are both linear: done at once, unless tiles are joined in between.
    at_once = isinstance(smooth, GaussianSmoothing) and getattr(network, "tiler", None) is None
    try:
        for parent, name, child in kept:
            if isinstance(child, TileByTile):
                setattr(parent, name, AllTiles())
            elif isinstance(child, (Upsample, AlignedUpsample)):
                setattr(parent, name, MatrixUpsample(child, smooth if at_once else None))
        if at_once:
            network.smooth = nn.Identity()
        yield
    finally:
        for parent, name, child in kept:
            setattr(parent, name, child)
