# SPDX-License-Identifier: Apache-2.0
"""The network of FractalAD: frozen teacher, student, cosine similarity attention and segmentation head."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import Conv2dNormActivation

from anomalib_fractalad.models.components import (
    AnomalyNetwork,
    Backbone,
    FrozenTeacher,
    ImageScore,
    Reduction,
    Upsample,
    cosine_distance,
    resize,
)

STRIDES = (4, 8, 16, 32)

_conv_norm_relu = partial(Conv2dNormActivation, bias=True)


class FractalADModel(AnomalyNetwork):
    """Segmentation of anomalies from a student's features, weighted by their distance to a frozen teacher's.

    FractalAD (arXiv 2301.12739), section III.

    Args:
        backbone: Name of a timm CNN with feature levels at strides 4, 8, 16 and 32.
        pre_trained: Load ImageNet weights into the teacher.
        distillation: Train a student and read its weighted features; otherwise the head reads the teacher's features.
        score: Image score from the anomaly map: ``mean`` (published), ``max`` or ``top`` (mean of the highest pixels).
        top_share: Share of the pixels, in (0, 1], that the score ``top`` takes.
        weights: Local timm checkpoint for the teacher, in place of ImageNet weights.

    Raises:
        ValueError: If the backbone lacks a level, or ``score`` or ``top_share`` is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        pre_trained: bool = True,
        distillation: bool = True,
        score: Reduction = "mean",
        top_share: float = 0.005,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(ImageScore(score, top_share))
        self.teacher = FrozenTeacher(backbone, STRIDES, pre_trained=pre_trained, weights=weights)
        self.student = Backbone(backbone, STRIDES, pre_trained=False) if distillation else None
        self.head = SegmentationHead(self.teacher.channels)

    def predict_map(self, images: Tensor) -> Tensor:
        """Predict anomaly maps of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, 1, H, W), values in [0, 1].
        """
        return self.segment(images).sigmoid()

    def segment(self, images: Tensor) -> Tensor:
        """Segment anomalies; gradients reach the head alone.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            Logits (B, 1, H, W).
        """
        features = self.teacher(images)
        if self.student is not None:
            with torch.no_grad():
                features = list(map(cosine_similarity_attention, features, self.student(images)))
        logits: Tensor = self.head(features, images.shape[-2:])
        return logits


def cosine_similarity_attention(teacher: Tensor, student: Tensor) -> Tensor:
    """Weight the student's features by how far they are from the teacher's: (1 - cos) / 2 x student.

    Args:
        teacher: (B, C, H, W).
        student: (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    return cosine_distance(teacher, student).to(student.dtype) / 2 * student


class SegmentationHead(nn.Module):
    """Semantic flow network (SFNet, Li et al., ECCV 2020): one logit map from the maps of several levels.

    Args:
        channels: Channels of each level, from the finest to the coarsest.
        width: Channels inside the head.
    """

    def __init__(self, channels: Sequence[int], width: int = 64) -> None:
        super().__init__()
        finer_levels = len(channels) - 1
        self.lateral = nn.ModuleList(_conv_norm_relu(level, width, kernel_size=1) for level in channels)
        self.align = nn.ModuleList(FlowAlignment(width) for _ in range(finer_levels))
        self.smooth = nn.ModuleList(_conv_norm_relu(width, width, kernel_size=3) for _ in range(finer_levels))
        self.fuse = _conv_norm_relu(len(channels) * width, width, kernel_size=3)
        self.classify = nn.Conv2d(width, 1, kernel_size=3, padding=1)
        self.upsample = Upsample()
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Fuse the levels from the coarsest to the finest and segment.

        Args:
            features: (B, C_i, H_i, W_i) for each level, from the finest to the coarsest.
            size: Height and width of the logits.

        Returns:
            Logits (B, 1, *size).
        """
        pyramid = [lateral(level) for lateral, level in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(pyramid) - 1)):
            pyramid[i] = self.smooth[i](pyramid[i] + self.align[i](pyramid[i], pyramid[i + 1]))
        finest = pyramid[0].shape[-2:]
        fused = self.fuse(torch.cat([resize(level, finest) for level in pyramid], dim=1))
        logits: Tensor = self.upsample(self.classify(fused), size)
        return logits


class FlowAlignment(nn.Module):
    """Warp a coarser map along a predicted flow, then bring it to the finer map's size.

    Args:
        width: Channels of both maps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.flow = nn.Conv2d(2 * width, 2, kernel_size=3, padding=1)

    def forward(self, finer: Tensor, coarser: Tensor) -> Tensor:
        """Align the coarser map with the finer.

        Args:
            finer: (B, C, H, W).
            coarser: (B, C, h, w).

        Returns:
            The coarser map, warped, (B, C, H, W).
        """
        flow = self.flow(torch.cat([finer, resize(coarser, finer.shape[-2:])], dim=1))
        return resize(warp(coarser, resize(flow, coarser.shape[-2:])), finer.shape[-2:])


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample an image where the flow points to; zeros outside.

    The published code divides pixel positions by size - 1 but samples with ``align_corners=False``; so does this.

    Args:
        image: (B, C, H, W).
        flow: (B, 2, H, W), x and y in pixels.

    Returns:
        (B, C, H, W).
    """
    height, width = image.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype).expand(height, width)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype).unsqueeze(1).expand(height, width)
    x = 2 * (x + flow[:, 0]) / max(width - 1, 1) - 1
    y = 2 * (y + flow[:, 1]) / max(height - 1, 1) - 1
    return F.grid_sample(image, torch.stack([x, y], dim=-1), align_corners=False)
