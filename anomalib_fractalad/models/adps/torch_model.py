# SPDX-License-Identifier: Apache-2.0
"""The network of ADPS: frozen teacher, student of patches, weight mask block and post-segmentation."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from anomalib_fractalad.models.components import (
    AnomalyNetwork,
    FrozenTeacher,
    ImageScore,
    at_least_float32,
    check_count,
    check_positive,
    cosine_distance,
    gaussian_blur,
)

from .student import PatchStudent

LAYERS = (4, 8, 16)  # the strides of a ResNet's first three levels


class ADPSModel(AnomalyNetwork):
    """Segmentation of anomalies from a teacher's features, weighted by how badly a student of patches follows them.

    ADPS (arXiv 2210.10495), section III.

    Args:
        backbone: Name of a timm CNN.
        pre_trained: Load ImageNet weights into the teacher.
        layers: The levels, from the finest to the coarsest: strides or names of timm's feature levels.
        patches: The student sees ``patches`` x ``patches`` parts of the image.
        split_layers: Those of ``layers`` after which the student's features are split 2 x 2 once more.
        smoothing: Standard deviation, in pixels, of the Gaussian that smooths the map before its maximum is taken.
        weights: Local timm checkpoint for the teacher, in place of ImageNet weights.

    Raises:
        ValueError: If the backbone lacks a level, or an argument is out of range.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        layers: Sequence[int | str] = LAYERS,
        patches: int = 8,
        split_layers: Sequence[int | str] = (),
        smoothing: float = 4.0,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(ImageScore("max"))
        check_count(patches=patches)
        check_positive(smoothing=smoothing)
        self.teacher = FrozenTeacher(backbone, layers, pre_trained=pre_trained, weights=weights)
        self.student = PatchStudent(backbone, layers, patches, split_layers)
        self.decoder = PostSegmentation(self.teacher.channels, self.teacher.strides)
        self.smooth = gaussian_blur(smoothing)

    def check_size(self, size: Sequence[int] | None) -> None:
        """Refuse images whose parts, tiles with a tiler and whole images without, cannot be divided into patches.

        Args:
            size: Height and width of the images; ``None`` where they are not known.

        Raises:
            ValueError: If they cannot, or if an image is smaller than a tile.
        """
        if self.tiler is None:
            if size is not None:
                self.student.check_size(size)
            return
        tile = (self.tiler.tile_size_h, self.tiler.tile_size_w)
        self.student.check_size(tile, "tile")
        if size is not None and (size[0] < tile[0] or size[1] < tile[1]):
            sizes = f"an image of {size[0]}x{size[1]} (height x width) is smaller than a tile of {tile[0]}x{tile[1]}"
            msg = f"{sizes}. Take smaller tiles (tile_size), or resize to a larger image in the pre-processor."
            raise ValueError(msg)

    def predict_map(self, images: Tensor) -> Tensor:
        """Predict anomaly maps of images as a whole.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, 1, H, W), values in [0, 1].
        """
        logits = self.segment(*self.compare(images))
        return at_least_float32(logits).softmax(dim=1)[:, 1:]

    def finish(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Take the maximum of smoothed maps as the scores of images.

        Args:
            maps: (B, 1, H, W), values in [0, 1].

        Returns:
            Scores (B,) and anomaly maps (B, 1, H, W), not smoothed, values in [0, 1].
        """
        anomaly_map = self.within_region(maps)
        return self.score(self.smooth(anomaly_map), self.region), anomaly_map

    def compare(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compare the teacher's features of the image with the student's of its patches.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            The teacher's features T_i, (B, C_i, H_i, W_i), and 1 - W_i = 1 - cos(T_i, S_i), (B, 1, H_i, W_i), for each
            level.

        Raises:
            ValueError: If the images cannot be divided into patches.
        """
        self.student.check_size(images.shape[-2:], "image" if self.tiler is None else "tile")
        teacher = self.teacher(images)
        return teacher, list(map(cosine_distance, teacher, self.student(images)))

    def segment(self, teacher: Sequence[Tensor], distances: Sequence[Tensor]) -> Tensor:
        """Weigh the teacher's features and segment anomalies.

        Args:
            teacher: (B, C_i, H_i, W_i) for each level.
            distances: (B, 1, H_i, W_i) for each level.

        Returns:
            Logits (B, 2, H, W), normal and anomalous.
        """
        return self.decoder(list(map(weight_mask_block, teacher, distances)))  # type: ignore[no-any-return]


def weight_mask_block(teacher: Tensor, distance: Tensor) -> Tensor:
    """The teacher's features, weighted by how badly the student follows: C = (1 - W) x T.

    Args:
        teacher: (B, C, H, W).
        distance: 1 - W, (B, 1, H, W).

    Returns:
        (B, C, H, W).
    """
    return distance.to(teacher.dtype) * teacher


class PostSegmentation(nn.Module):
    """U-Net's decoder (Ronneberger et al., MICCAI 2015), from weighted features to logits of the image's size.

    Args:
        channels: Channels of each level, from the finest to the coarsest.
        strides: Stride of each level, powers of 2.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        skips = dict(zip(strides, channels, strict=True))
        width, stride = channels[-1], strides[-1]
        self.blocks = nn.ModuleList()
        while stride > 1:
            stride //= 2
            skip = skips.get(stride, 0)
            out_channels = skip or max(width // 2, 16)
            self.blocks.append(UpBlock(width, skip, out_channels))
            width = out_channels
        self.classify = nn.Conv2d(width, 2, kernel_size=3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Segment.

        Args:
            features: (B, C_i, H / stride_i, W / stride_i) for each level, from the finest to the coarsest.

        Returns:
            Logits (B, 2, H, W), normal and anomalous.
        """
        *skips, x = features
        for block in self.blocks:
            x = block(x, skips.pop() if block.has_skip else None)
        logits: Tensor = self.classify(x)
        return logits


class UpBlock(nn.Module):
    """Double the size, join with the features of the next finer level where there is one, and convolve twice.

    Args:
        in_channels: Channels of the coarser map.
        skip_channels: Channels of the finer level; 0 where there is none.
        out_channels: Channels of the result.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.has_skip = skip_channels > 0
        conv_norm_relu = partial(Conv2dNormActivation, kernel_size=3)
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.convolve = nn.Sequential(
            conv_norm_relu(out_channels + skip_channels, out_channels),
            conv_norm_relu(out_channels, out_channels),
        )

    def forward(self, coarser: Tensor, finer: Tensor | None) -> Tensor:
        """Go one level up.

        Args:
            coarser: (B, C, H, W).
            finer: (B, C', 2H, 2W), or ``None`` without a skip.

        Returns:
            (B, C'', 2H, 2W).
        """
        x = self.up(coarser)
        if finer is not None:
            x = torch.cat([x, finer], dim=1)
        result: Tensor = self.convolve(x)
        return result
