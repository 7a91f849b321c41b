# SPDX-License-Identifier: Apache-2.0
"""The network of FractalMemory: frozen teacher, whitened descriptors, memory, and a head on the residual."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from anomalib_fractalad.models.components import (
    AnomalyNetwork,
    FrozenTeacher,
    ImageScore,
    Reduction,
    RegionOfInterest,
    Upsample,
    at_least_float32,
    check_count,
    resize,
)
from anomalib_fractalad.models.components.smoothing import GaussianSmoothing

from .head import BoundedVote, ResidualHead
from .memory import Descriptor, FeatureMemory, align
from .saturation import Saturation

STRIDES = (4, 8, 16)


class FractalMemoryModel(AnomalyNetwork):
    """Distances to the nearest normal features, and a segmentation of the difference from them.

    Args:
        backbone: Name of a timm CNN with feature levels at strides 4, 8 and 16.
        pre_trained: Load ImageNet weights into the teacher.
        memory_size: Number of normal descriptors that the memory holds of each level.
        saturation: How early a level's distance saturates in the map, see :class:`Saturation`. At 0, it does not.
        head: Whether there is a head.
        width: Channels of the head.
        sigma: Standard deviation in pixels of the smoothing of maps.
        score: Image score from the anomaly map: ``top`` (mean of the highest pixels), ``mean`` or ``max``.
        top_share: Share of the pixels, in (0, 1], that the score ``top`` takes.
        weights: Local timm checkpoint for the teacher, in place of ImageNet weights.

    Raises:
        ValueError: If the backbone lacks a level, or another argument is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        pre_trained: bool = True,
        memory_size: int = 2000,
        saturation: float = 1.0,
        head: bool = False,
        width: int = 64,
        sigma: int = 5,
        score: Reduction = "top",
        top_share: float = 0.005,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(ImageScore(score, top_share))
        check_count(memory_size=memory_size, width=width, sigma=sigma)
        self.teacher = FrozenTeacher(backbone, STRIDES, pre_trained=pre_trained, weights=weights)
        self.descriptor = Descriptor(self.teacher.channels)
        channels = sum(self.teacher.channels)
        self.memory = FeatureMemory(memory_size, self.teacher.channels)
        self.head = ResidualHead(channels, width) if head else None
        self.saturation = Saturation(len(self.teacher.channels), saturation)
        self.vote = BoundedVote()
        self.upsample = Upsample()
        self.smooth = GaussianSmoothing(sigma)

    def predict_map(self, images: Tensor) -> Tensor:
        """Predict maps, not smoothed, of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            The distance, and if there is saturation or a head, what the map is made of: (B, 1 or 2, H, W).
        """
        features = self.teacher(images)
        residual, distances = (None, self.distances(features)) if self.head is None else self.compare(features)
        return self._maps(residual, distances, images.shape[-2:])

    def finish(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth maps and bring them to their range.

        Args:
            maps: What :meth:`predict_map` gives, (B, 1 or 2, H, W).

        Returns:
            Scores (B,), from 0 on: log(1 + x) of the distance, of which 1 is normal. Anomaly maps (B, 1, H, W): what
            :meth:`Saturation.excess` gives, of which 0 is normal; without saturation log(1 + x) of the distance, too.
            Neither saturation nor a head changes the score.
        """
        score, anomaly_map = self._smoothed(maps, self.region)
        return score, self.within_region(anomaly_map)

    def refined_map(self, residual: Tensor, distances: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Predict scores and maps of images that have been compared.

        Args:
            residual: (B, C, h, w).
            distances: (B, S, h, w).
            size: Height and width of the images.

        Returns:
            Scores (B,) and maps (B, 1, H, W).
        """
        return self._smoothed(self._maps(residual, distances, size))

    def _maps(self, residual: Tensor | None, distances: Tensor, size: Sequence[int]) -> Tensor:
        # As fine as the head's logit. An export smooths in the same product that it upsamples in: this is not for it.
        fine = [2 * side for side in distances.shape[-2:]]
        distance = distances.sum(dim=1, keepdim=True)
        maps = [resize(distance, fine)]
        if self.saturation.strength:
            maps.append(resize(self.saturation(distances), fine))
        if self.head is not None and residual is not None:
            logit = at_least_float32(self.head(residual, distance))
            level = 1 / len(self.teacher.channels) if self.saturation.strength else self.saturation.spread.mean()
            voted = self.vote(maps[-1], logit, level)
            # A vote that counts is one level more that can agree.
            maps[1:] = [voted / (1 + self.vote.weight * level) if self.saturation.strength else voted]
        return torch.cat([self.upsample(channel, size) for channel in maps], dim=1)

    def _smoothed(self, maps: Tensor, region: RegionOfInterest | None = None) -> tuple[Tensor, Tensor]:
        """Smooth maps; scores are the distance's. The logarithm keeps what takes a sigmoid, as metrics do, in order."""
        distance, *others = [self.smooth(at_least_float32(channel)) for channel in torch.split(maps, 1, dim=1)]
        score = self.score(distance, region).log1p()
        if not self.saturation.strength:
            return score, (others[0] if others else distance).log1p()
        return score, self.saturation.excess(others[0])

    @property
    def trained_head(self) -> "ResidualHead":
        """The head of a network that has one."""
        return cast("ResidualHead", self.head)

    def distances(self, features: Sequence[Tensor]) -> Tensor:
        """Measure each level's distance from the memory, without autocast; the same as :meth:`compare`'s.

        Args:
            features: The teacher's, (B, C_i, H_i, W_i) for each level.

        Returns:
            (B, S, H, W).
        """
        with torch.autocast(features[0].device.type, enabled=False):
            return self.memory.distances(self.descriptor(features))

    def compare(self, features: Sequence[Tensor], hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compare features with the memory, without autocast.

        Args:
            features: The teacher's, (B, C_i, H_i, W_i) for each level.
            hidden: Items that are passed over, boolean (B, N, S). Left out, none are.

        Returns:
            Whitened residual to each level's nearest item, (B, C, H, W) with C the sum of C_i, and the levels'
            distances, its root mean square over each level's channels, (B, S, H, W).
        """
        with torch.autocast(features[0].device.type, enabled=False):
            residual = self.memory.residual(self.descriptor(features), hidden)
            return align(residual), self.memory.lengths(residual)
