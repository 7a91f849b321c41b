# SPDX-License-Identifier: Apache-2.0
"""The network of AAND: a frozen teacher with amplified anomalies, and a student that knows normal features."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from anomalib_fractalad.models.components import (
    AlignedUpsample,
    AnomalyNetwork,
    FrozenTeacher,
    GaussianSmoothing,
    ImageScore,
    Reduction,
    check_count,
    cosine_distance,
    is_whole,
)

from .amplification import AmplifiedLevel, ResidualAnomalyAmplification
from .student import PUBLISHED_STRIDES, reverse_student

Alignment = Literal["corners", "centers", "centres"]  # the last is an older spelling
SIGMA = 4


class AANDModel(AnomalyNetwork):
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

    Raises:
        ValueError: If the backbone lacks a level, or ``strides``, ``score``, ``top_share``, ``alignment`` or
            ``amplifier_width`` is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

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
        super().__init__(ImageScore(score, top_share))
        check_count(amplifier_width=amplifier_width)
        _check_strides(strides)
        if alignment not in get_args(Alignment):
            msg = f"alignment {alignment!r} is unknown; use one of {', '.join(get_args(Alignment)[:2])}"
            raise ValueError(msg)
        self.teacher = FrozenTeacher(backbone, strides, pre_trained=pre_trained, weights=weights)
        channels = self.teacher.channels
        self.amplifiers = nn.ModuleList(
            ResidualAnomalyAmplification(level, amplifier_width) for level in (channels if amplification else [])
        )
        self.student = reverse_student(backbone, channels, strides, fine_embedding)
        self.upsample = nn.ModuleList(AlignedUpsample(None if alignment == "corners" else s) for s in strides)
        self.smooth = GaussianSmoothing(SIGMA)

    def predict_map(self, images: Tensor) -> Tensor:
        """Predict anomaly maps of images as a whole, not yet smoothed.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, 1, H, W), values in [0, 2 x levels].
        """
        teacher = self.advanced_teacher(images)
        return distance_map(teacher, self.student(teacher), images.shape[-2:], self.upsample)

    def finish(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Smooth maps.

        Args:
            maps: (B, 1, H, W), values in [0, 2 x levels].

        Returns:
            Scores (B,) and anomaly maps (B, 1, H, W), values in [0, 2 x levels].
        """
        return super().finish(self.smooth(maps))

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
    upsample: Iterable[nn.Module],
) -> Tensor:
    """Sum over levels of 1 - cos(teacher, student), each brought to the image's size.

    Args:
        teacher: (B, C_i, H_i, W_i) for each level.
        student: The same shapes.
        size: Height and width of the image.
        upsample: Brings a level's map to that size, for each level.

    Returns:
        (B, 1, *size), values in [0, 2 x levels].
    """
    distances = map(cosine_distance, teacher, student)
    maps = [to_size(distance, size) for to_size, distance in zip(upsample, distances, strict=True)]
    return torch.stack(maps).sum(dim=0)


def _check_strides(strides: Sequence[int]) -> None:
    doubled = all(coarse == 2 * fine for fine, coarse in pairwise(strides))
    if not strides or not all(map(is_whole, strides)) or not doubled:
        msg = f"strides is {tuple(strides)}; each must be twice the one before, such as (4, 8, 16) or (8, 16)"
        raise ValueError(msg)
