# SPDX-License-Identifier: Apache-2.0
"""The network of FractalMemory: frozen teacher, whitened descriptors, memory, and a head on the residual."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import (
    FrozenTeacher,
    ImageScore,
    Reduction,
    TileByTile,
    Upsample,
    at_least_float32,
    check_count,
    check_positive,
    gaussian_blur,
)

STRIDES = (4, 8, 16)


class FractalMemoryModel(nn.Module):
    """Distance to the nearest normal feature, and a segmentation of the difference from it.

    Args:
        backbone: Name of a timm CNN with feature levels at strides 4, 8 and 16.
        pre_trained: Load ImageNet weights into the teacher.
        memory_size: Number of normal descriptors that the memory holds.
        width: Channels of the head.
        sigma: Standard deviation in pixels of the smoothing of maps.
        score: Image score from the anomaly map: ``top`` (mean of the highest pixels), ``mean`` or ``max``.
        top_share: Share of the pixels, in (0, 1], that the score ``top`` takes.
        weights: Local timm checkpoint for the teacher, in place of ImageNet weights.

    Attributes:
        tiler: What large images are cut with for prediction; set by anomalib's TilerConfigurationCallback.

    Raises:
        ValueError: If the backbone lacks a level, or another argument is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    tiler: Tiler | None = None

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        pre_trained: bool = True,
        memory_size: int = 2000,
        width: int = 64,
        sigma: float = 4.0,
        score: Reduction = "top",
        top_share: float = 0.005,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_count(memory_size=memory_size, width=width)
        check_positive(sigma=sigma)
        self.score = ImageScore(score, top_share)
        self.teacher = FrozenTeacher(backbone, STRIDES, pre_trained=pre_trained, weights=weights)
        self.descriptor = Descriptor(self.teacher.channels)
        channels = sum(self.teacher.channels)
        self.memory = FeatureMemory(memory_size, channels)
        self.head = ResidualHead(channels, width)
        self.fusion = Fusion()
        self.upsample = Upsample()
        self.smooth = gaussian_blur(sigma)
        self.by_tiles = TileByTile()

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict anomaly maps and image scores.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            ``anomaly_map`` (B, 1, H, W) and ``pred_score`` (B,). Half of the normal pixels are below 0, and 99.5 % of
            them about below 1.
        """
        anomaly_map = self.smooth_map(self.by_tiles(self.predict_map, images, self.tiler))
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def smooth_map(self, anomaly_map: Tensor) -> Tensor:
        """Smooth maps (B, 1, H, W) in full precision."""
        with torch.autocast(anomaly_map.device.type, enabled=False):
            smoothed: Tensor = self.smooth(at_least_float32(anomaly_map))
        return smoothed

    def predict_map(self, images: Tensor) -> Tensor:
        """Predict maps, not smoothed, of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, 1, H, W).
        """
        residual, distance = self.compare(self.teacher(images))
        maps: Tensor = self.upsample(self.fusion(*self.maps(residual, distance)), images.shape[-2:])
        return maps

    def maps(self, residual: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the distance to the size of the head's logit.

        Args:
            residual: (B, C, H, W).
            distance: (B, 1, H, W).

        Returns:
            Distance and logit, (B, 1, 2H, 2W) each, in float32 or wider.
        """
        logit = at_least_float32(self.head(residual, distance))
        return self.upsample(distance, logit.shape[-2:]), logit

    def compare(self, features: Sequence[Tensor], owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compare features with the memory, in full precision.

        Args:
            features: The teacher's, (B, C_i, H_i, W_i) for each level.
            owner: Numbers (B,) of the images' owners, whose items are passed over. Left out, none are.

        Returns:
            Whitened residual to the nearest item, (B, C, H, W) with C the sum of C_i, and its length (B, 1, H, W).
        """
        with torch.autocast(features[0].device.type, enabled=False):
            query = self.descriptor(features)
            residual = query - self.memory(query, owner)
            return residual, residual.square().sum(dim=1, keepdim=True).clamp(min=1e-12).sqrt()


class Descriptor(nn.Module):
    """Standardized features, averaged over 3x3 places, joined at the middle level's stride and whitened.

    The border, whose features are noise, is damped (see :func:`average`).

    Args:
        channels: Channels of each level.

    Attributes:
        mean: Mean of each channel over normal features, (C,).
        deviation: Standard deviation of each channel, (C,).
        whiten: (C, C, 1, 1), what turns averages into whitened descriptors.
        shift: (C,), what is added after that.
    """

    mean: Tensor
    deviation: Tensor
    whiten: Tensor
    shift: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        total = sum(channels)
        self.channels = list(channels)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("deviation", torch.ones(total))
        self.register_buffer("whiten", torch.eye(total)[..., None, None])
        self.register_buffer("shift", torch.zeros(total))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Describe each place of the middle level.

        Args:
            features: (B, C_i, H_i, W_i) for each level, from the finest to the coarsest.

        Returns:
            (B, C, H_1, W_1), C the sum of C_i, of zero mean and about unit covariance on normal images.
        """
        means, deviations = self.mean.split(self.channels), self.deviation.split(self.channels)
        standard = [
            (at_least_float32(level) - mean[:, None, None]) / deviation[:, None, None]
            for level, mean, deviation in zip(features, means, deviations, strict=True)
        ]
        return F.conv2d(average(standard), self.whiten, self.shift)


def average(features: Sequence[Tensor]) -> Tensor:
    """Average over 3x3 places of the middle level, join the levels, and damp the border, whose features are noise.

    Each place is multiplied by the share of a 3x3 window, at its level's own stride, that lies within the image;
    windows of the fine level are the middle one's. This is what counting the zeros beyond the border does in PatchCore,
    without averages as wide as the coarse level's windows.

    Args:
        features: (B, C_i, H_i, W_i) for the levels of strides 4, 8 and 16.

    Returns:
        (B, C, H_1, W_1), C the sum of C_i.
    """
    size = tuple(features[1].shape[-2:])
    averages = []
    for level, own in zip(features, (features[1], features[1], features[2]), strict=True):
        inside = _resize(F.avg_pool2d(torch.ones_like(own[:1, :1]), 3, stride=1, padding=1), size).to(level.dtype)
        mean = F.avg_pool2d(_resize(level, size), 3, stride=1, padding=1, count_include_pad=False)
        averages.append(mean * inside)
    return torch.cat(averages, dim=1)


class FeatureMemory(nn.Module):
    """Normal descriptors, and the search for the nearest.

    Args:
        size: Number of items.
        channels: Channels of an item.

    Attributes:
        items: (N, C).
        owners: Number of the owner of each item, (N,).
    """

    items: Tensor
    owners: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(size, channels))
        self.register_buffer("owners", torch.full((size,), -1))

    @torch.no_grad()
    def fill(self, items: Tensor, owners: Tensor) -> None:
        """Replace all items; fewer than the memory's size are repeated.

        Args:
            items: (n, C), at least one and at most N.
            owners: (n,).
        """
        index = torch.arange(len(self.items), device=items.device) % len(items)
        self.items.copy_(items[index])
        self.owners.copy_(owners[index])

    def forward(self, query: Tensor, owner: Tensor | None = None) -> Tensor:
        """Find the nearest item to each place.

        Args:
            query: (B, C, H, W).
            owner: Numbers (B,) of owners whose items are passed over, but where no other are.

        Returns:
            The nearest items, (B, C, H, W).
        """
        # |q - m|^2 without |q|^2, which all items share.
        distance = F.conv2d(query, -2 * self.items[..., None, None], self.items.square().sum(dim=1))
        if owner is not None:
            own = self.owners == owner[:, None]
            own &= ~own.all(dim=1, keepdim=True)
            distance.masked_fill_(own[..., None, None], torch.inf)
        index = distance.argmin(dim=1)
        return F.embedding(index, self.items).permute(0, 3, 1, 2)


class ResidualHead(nn.Module):
    """A small segmentation network that sees the residual and its length, and never the features themselves.

    Args:
        channels: Channels of the residual.
        width: Channels inside the head.

    Attributes:
        typical_distance: Mean distance of normal places, which the distance is divided by.
    """

    typical_distance: Tensor

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("typical_distance", torch.ones(()))
        self.embed = nn.Conv2d(channels + 1, width, kernel_size=1)
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, kernel_size=5, padding=2, groups=width),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, kernel_size=1),
        )
        self.enlarge = nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)
        self.classify = nn.Sequential(
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width // 2, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, 1, kernel_size=1),
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, residual: Tensor, distance: Tensor) -> Tensor:
        """Segment anomalies.

        Args:
            residual: (B, C, H, W).
            distance: (B, 1, H, W).

        Returns:
            Logits (B, 1, 2H, 2W).
        """
        # The root keeps single large channels from drowning the others.
        rooted = residual.sign() * residual.abs().sqrt()
        x = self.embed(torch.cat([rooted, distance / self.typical_distance - 1], dim=1))
        x = x + self.spatial(x)
        logits: Tensor = self.classify(self.enlarge(x))
        return logits


class Fusion(nn.Module):
    """Distance and logit, each scaled by its median and 99.5 % quantile on normal pixels, and added.

    Attributes:
        center: Medians of distance and logit, (2,).
        spread: Their 99.5 % quantiles less the medians, (2,).
        weight: Their weights, (2,), sum 1.
    """

    center: Tensor
    spread: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(2))
        self.register_buffer("spread", torch.ones(2))
        self.register_buffer("weight", torch.tensor([1.0, 0.0]))

    def set_head_weight(self, weight: float) -> None:
        """Set how much the logit counts, from 0 to 1; the distance counts the rest."""
        self.weight.copy_(torch.tensor([1 - weight, weight]))

    def forward(self, distance: Tensor, logit: Tensor) -> Tensor:
        """Fuse two maps.

        Args:
            distance: (B, 1, H, W).
            logit: (B, 1, H, W).

        Returns:
            (B, 1, H, W).
        """
        scale = self.weight / self.spread
        return (distance - self.center[0]) * scale[0] + (logit - self.center[1]) * scale[1]


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
