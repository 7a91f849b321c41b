# SPDX-License-Identifier: Apache-2.0
"""What the networks have in common: the way from images to scores around their own maps."""

from abc import ABC, abstractmethod

from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn

from .region import RegionOfInterest
from .score import ImageScore
from .tiling import TileByTile


class AnomalyNetwork(nn.Module, ABC):
    """A network that predicts anomaly maps and image scores, of large images tile by tile, of a region or of all.

    Args:
        score: Reduces maps to image scores.

    Attributes:
        tiler: What large images are cut with for prediction; set by anomalib's TilerConfigurationCallback.
        region: What of the images counts, where not all does.
    """

    tiler: Tiler | None = None
    region: RegionOfInterest | None

    def __init__(self, score: ImageScore) -> None:
        super().__init__()
        self.register_module("region", None)
        self.score = score
        self.by_tiles = TileByTile()

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict anomaly maps and image scores.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            ``anomaly_map`` (B, 1, H, W) and ``pred_score`` (B,), in the range of :meth:`finish`.
        """
        if self.region is not None:
            images = self.region.hide(images)
        score, anomaly_map = self.finish(self.by_tiles(self.predict_map, images, self.tiler))
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    @abstractmethod
    def predict_map(self, images: Tensor) -> Tensor:
        """Predict maps of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, C, H, W), what :meth:`finish` takes.
        """

    def finish(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the maps of images, joined from those of their tiles, into predictions.

        Args:
            maps: (B, 1, H, W).

        Returns:
            Scores (B,) and anomaly maps (B, 1, H, W), both in the range of the maps.
        """
        anomaly_map = self.within_region(maps)
        return self.score(anomaly_map, self.region), anomaly_map

    def within_region(self, maps: Tensor) -> Tensor:
        """Set maps (B, 1, H, W) to their lowest value outside a region, if there is one."""
        return maps if self.region is None else self.region.lower(maps)
