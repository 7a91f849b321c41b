# SPDX-License-Identifier: Apache-2.0
"""The network of AAND: a frozen teacher with amplified anomalies, and a student that knows normal features."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import (
    FrozenTeacher,
    ImageScore,
    Reduction,
    check_count,
    cosine_distance,
    gaussian_blur,
    is_whole,
    predict_by_tiles,
    resample,
)

from .amplification import AmplifiedLevel, ResidualAnomalyAmplification
from .student import PUBLISHED_STRIDES, reverse_student

Alignment = Literal["corners", "centers", "centres"]  # the last is an older spelling
SIGMA = 4


class AANDModel(nn.Module):
    """Distance between the features of an advanced teacher and a student.

    AAND (arXiv 2405.02068). The losses are in :class:`AAND`.

    Args:
        backbone: Name of a timm CNN with feature levels at the strides.
        pre_trained: Load ImageNet weights into the teacher.
        amplification: Amplify anomalies; otherwise this is plain reverse distillation.
        score: Image score from the anomaly map: ``max`` (published), ``mean`` or ``top`` (mean of the highest pixels).
        top_share: Share of the pixels, in (0, 1], that the score ``top`` takes.
        weights: Local timm checkpoint for the teacher, in place of ImageNet weights.
        strides: Strides of the levels that are compared, each twice the one before; 4, 8 and 16 are the published ones.
        alignment: How levels are brought to the image's size: ``corners`` (published) stretches them from border to
            border, ``centers`` puts position i at pixel stride x i, where its receptive field has its center if
            convolutions pad evenly.
        amplifier_width: Channels of the hidden layers that amplify anomalies; left out, the published min(2 x channels
            of the level, 1024).
        fine_embedding: Let the student decode from an embedding as fine as the coarsest level.

    Attributes:
        tiler: What large images are cut with for prediction; set by anomalib's TilerConfigurationCallback.

    Raises:
        ValueError: If the backbone lacks a level, or ``strides``, ``score``, ``top_share``, ``alignment`` or
            ``amplifier_width`` is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    tiler: Tiler | None = None

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        amplification: bool = True,
        score: Reduction = "max",
        top_share: float = 0.005,
        weights: str | Path | None = None,
        strides: Sequence[int] = PUBLISHED_STRIDES,
        alignment: Alignment = "corners",
        amplifier_width: int | None = None,
        fine_embedding: bool = False,
    ) -> None:
        super().__init__()
        check_count(amplifier_width=amplifier_width)
        _check_strides(strides)
        if alignment not in get_args(Alignment):
            msg = f"alignment {alignment!r} is unknown; use one of {', '.join(get_args(Alignment)[:2])}"
            raise ValueError(msg)
        self.center_strides = None if alignment == "corners" else tuple(strides)
        self.score = ImageScore(score, top_share)
        self.teacher = FrozenTeacher(backbone, strides, pre_trained=pre_trained, weights=weights)
        channels = self.teacher.channels
        self.amplifiers = nn.ModuleList(
            ResidualAnomalyAmplification(level, amplifier_width) for level in (channels if amplification else [])
        )
        self.student = reverse_student(backbone, channels, strides, fine_embedding)
        self.smooth = GaussianSmoothing(SIGMA)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Predict anomaly maps and image scores.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            ``anomaly_map`` (B, 1, H, W) and ``pred_score`` (B,), values in [0, 2 x levels].
        """
        if self.tiler is None:
            anomaly_map = self.predict_map(images, self.smooth)
        else:
            anomaly_map = self.smooth(predict_by_tiles(self.predict_map, images, self.tiler))
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def predict_map(self, images: Tensor, smooth: "GaussianSmoothing | None" = None) -> Tensor:
        """Predict anomaly maps of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].
            smooth: Smooths the maps; left out, they stay as they are.

        Returns:
            (B, 1, H, W), values in [0, 2 x levels].
        """
        teacher = self.advanced_teacher(images)
        return distance_map(teacher, self.student(teacher), images.shape[-2:], self.center_strides, smooth)

    def compare(self, images: Tensor, mask: Tensor, foreground: Tensor) -> list[AmplifiedLevel]:
        """Compare normal and anomalous positions, plain and amplified: what stage I's losses see.

        Args:
            images: Images with anomalies, (B, 3, H, W), values in [0, 1].
            mask: Where they are anomalous, (B, 1, H, W), true or false.
            foreground: What normal positions are drawn from, (B, 1, H, W), true or false.

        Returns:
            Gates and features of positions for each level.
        """
        amplifiers = cast("Iterable[ResidualAnomalyAmplification]", self.amplifiers)
        levels = zip(amplifiers, self.teacher(images), strict=True)
        return [amplifier.compare(features, mask, foreground) for amplifier, features in levels]

    def advanced_teacher(self, images: Tensor) -> list[Tensor]:
        """Extract features and amplify them where they look anomalous.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, C_i, H / stride_i, W / stride_i), rounded up, for each level.
        """
        features: list[Tensor] = self.teacher(images)
        if not self.amplifiers:
            return features
        return [amplify(level) for amplify, level in zip(self.amplifiers, features, strict=True)]


def distance_map(
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    size: Sequence[int],
    strides: Sequence[int] | None = None,
    smooth: "GaussianSmoothing | None" = None,
) -> Tensor:
    """Sum over levels of 1 - cos(teacher, student), each brought to the image's size.

    Interpolation and smoothing are both linear, and done at once.

    Args:
        teacher: (B, C_i, H_i, W_i) for each level.
        student: The same shapes.
        size: Height and width of the image.
        strides: The levels' strides, to put position i at pixel stride x i. Left out, levels are stretched from border
            to border.
        smooth: Smooths the sum; left out, it stays as it is.

    Returns:
        (B, 1, *size), values in [0, 2 x levels].
    """
    all_strides = [None] * len(teacher) if strides is None else strides
    distances = map(cosine_distance, teacher, student)
    maps = [
        resample(distance, size, partial(_spread, stride=stride, smooth=smooth))
        for distance, stride in zip(distances, all_strides, strict=True)
    ]
    return torch.stack(maps).sum(dim=0)


def _spread(rows: Tensor, length: int, stride: int | None, smooth: "GaussianSmoothing | None") -> Tensor:
    """Spread rows of positions (N, n) over pixels (N, length).

    Position i lies at pixel stride x i, the center of its receptive field where convolutions pad evenly; without a
    stride, positions are stretched from border to border.
    """
    covered = length if stride is None else stride * (rows.shape[-1] - 1) + 1
    pixels = F.interpolate(rows.unsqueeze(0), size=covered, mode="linear", align_corners=True)
    pixels = F.pad(pixels, (0, length - covered), mode="replicate")
    return pixels.squeeze(0) if smooth is None else smooth.along_rows(pixels.unsqueeze(0)).flatten(0, 2)


class GaussianSmoothing(nn.Module):
    """Gaussian filter; beyond its edges the map is mirrored, edge pixels included.

    Args:
        sigma: Standard deviation in pixels.
    """

    def __init__(self, sigma: int) -> None:
        super().__init__()
        self.radius = 4 * sigma
        self.blur = gaussian_blur(sigma, padding="valid")

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
        smoothed: Tensor = self.blur[1](torch.cat([before, anomaly_map, after], dim=-1))
        return smoothed


def _check_strides(strides: Sequence[int]) -> None:
    doubled = all(coarse == 2 * fine for fine, coarse in pairwise(strides))
    if not strides or not all(map(is_whole, strides)) or not doubled:
        msg = f"strides is {tuple(strides)}; each must be twice the one before, such as (4, 8, 16) or (8, 16)"
        raise ValueError(msg)
