# SPDX-License-Identifier: Apache-2.0
"""Stage II of AAND: reverse distillation's bottleneck and decoder."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import Conv2dNormActivation

PUBLISHED_STRIDES = (4, 8, 16)


def reverse_student(
    backbone: str,
    channels: Sequence[int],
    strides: Sequence[int] = PUBLISHED_STRIDES,
    fine_embedding: bool = False,
) -> nn.Module:
    """Choose the student for a teacher: anomalib's for the ResNets that it has one for, and else a small one.

    Args:
        backbone: Name of the teacher's timm model.
        channels: Channels of the teacher's levels.
        strides: Strides of the teacher's levels; anomalib's student takes the published ones only.
        fine_embedding: Decode from an embedding as fine as the coarsest level, which the small student alone can.

    Returns:
        A module that takes the features of all levels and gives as many of the same shapes.
    """
    architecture = backbone.partition(".")[0]
    if fine_embedding or tuple(strides) != PUBLISHED_STRIDES:
        return SmallStudent(channels, fine_embedding)
    try:
        decoder = get_decoder(architecture)
    except ValueError:
        return SmallStudent(channels)
    bottleneck = get_bottleneck_layer(architecture)
    # Layers that it never uses: millions of weights in each checkpoint, and no gradient for distributed training.
    bottleneck.conv4 = bottleneck.bn4 = nn.Identity()  # type: ignore[assignment]
    return ResNetStudent(bottleneck, decoder)


class ResNetStudent(nn.Module):
    """Reverse distillation (Deng and Li, CVPR 2022) with the bottleneck and decoder of anomalib.

    Args:
        bottleneck: Embeds the features of three levels.
        decoder: Decodes the embedding into three levels.
    """

    def __init__(self, bottleneck: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.decoder = decoder
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Squeeze the features into an embedding and decode them again.

        Args:
            features: (B, C_i, H_i, W_i) at strides 4, 8 and 16.

        Returns:
            The same shapes.
        """
        decoded = self.decoder(self.bottleneck(list(features)))
        # The decoder doubles sizes that the teacher has rounded up.
        return [s[..., : t.shape[-2], : t.shape[-1]] for s, t in zip(decoded, features, strict=True)]


class SmallStudent(nn.Module):
    """Reverse distillation for any teacher, with depthwise separable convolutions.

    Args:
        channels: Channels of the teacher's levels, from the finest to the coarsest, each half the size of the last.
        fine_embedding: Decode from an embedding of the coarsest level's size, with half of its channels; otherwise, as
            reverse distillation does, of half of its size, with twice its channels. Both hold as many values.
    """

    def __init__(self, channels: Sequence[int], fine_embedding: bool = False) -> None:
        super().__init__()
        coarsest = channels[-1]
        embedding, stride = (coarsest // 2, 1) if fine_embedding else (2 * coarsest, 2)
        self.shrink = nn.ModuleList(
            nn.Sequential(*(_separable(fine, coarse, stride=2) for fine, coarse in pairwise(channels[level:])))
            for level in range(len(channels))
        )
        self.embed = _separable(len(channels) * coarsest, embedding, stride)
        self.reduce = nn.ModuleList(
            Conv2dNormActivation(coarse, fine, kernel_size=1) for fine, coarse in pairwise([*channels, embedding])
        )
        self.refine = nn.ModuleList(nn.Sequential(_separable(c, c), _separable(c, c)) for c in channels)
        self.predict = nn.ModuleList(nn.Conv2d(c, c, kernel_size=1) for c in channels)
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Squeeze the features into an embedding and decode them again.

        Args:
            features: (B, C_i, H_i, W_i) for each level, from the finest to the coarsest.

        Returns:
            The same shapes.
        """
        height, width = features[-1].shape[-2:]
        # Teachers differ in how they round sizes that cannot be halved; shrinking rounds up.
        small = [shrink(level)[..., :height, :width] for shrink, level in zip(self.shrink, features, strict=True)]
        x = self.embed(torch.cat(small, dim=1))
        decoded = []
        for level in reversed(range(len(features))):
            x = F.interpolate(self.reduce[level](x), size=features[level].shape[-2:], mode="bilinear")
            x = self.refine[level](x)
            decoded.append(self.predict[level](x))
        return decoded[::-1]


def _separable(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        Conv2dNormActivation(in_channels, in_channels, kernel_size=3, stride=stride, groups=in_channels),
        Conv2dNormActivation(in_channels, out_channels, kernel_size=1),
    )
