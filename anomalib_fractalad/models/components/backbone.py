# SPDX-License-Identifier: Apache-2.0
"""Teacher and student backbones from timm."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A convolutional timm backbone that takes images in [0, 1] and gives feature maps of several stages.

    Images are normalised with ImageNet's statistics inside, so that whatever makes anomalies sees plain images.

    Args:
        name: Name of a timm model.
        layers: The stages: strides (numbers) or names of timm's feature levels (such as ``layer2`` or ``blocks.3``).
        pre_trained: Load ImageNet weights; otherwise weights are random.

    Attributes:
        channels: Channels of each stage.
        strides: Stride of each stage relative to the image.
        levels: Name of each stage in timm.

    Raises:
        ValueError: If the backbone is unknown to timm, gives no feature maps, or lacks a stage.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    def __init__(self, name: str, layers: Sequence[int | str], *, pre_trained: bool) -> None:
        super().__init__()
        levels = _find_levels(name, layers)
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        features = _create_model(name, pretrained=pre_trained, out_indices=tuple(levels))
        self.features: nn.Module = features
        self.channels: list[int] = features.feature_info.channels()
        self.strides: list[int] = features.feature_info.reduction()
        self.levels: list[str] = features.feature_info.module_name()
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract features.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            One map (B, C_i, H / stride_i, W / stride_i), rounded up, for each stage.
        """
        features: list[Tensor] = self.features(self.normalize(images))
        return features


class FrozenTeacher(Backbone):
    """A backbone that never changes: no gradients, and batch norms stay in evaluation mode.

    Args:
        name: Name of a timm model.
        layers: The stages: strides (numbers) or names of timm's feature levels.
        pre_trained: Load ImageNet weights; otherwise weights are random.
    """

    def __init__(self, name: str, layers: Sequence[int | str], *, pre_trained: bool) -> None:
        super().__init__(name, layers, pre_trained=pre_trained)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":  # noqa: ARG002
        """Stay in evaluation mode, whatever ``mode``."""
        return super().train(mode=False)


def _create_model(name: str, *, pretrained: bool, **features: Any) -> Any:
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, exportable=True, **features)
    except Exception as error:
        if not pretrained:
            raise
        msg = (
            f"The pre-trained weights of backbone {name!r} could not be loaded ({type(error).__name__}: {error}). "
            "Without a network, put them into the Hugging Face cache beforehand (HF_HUB_CACHE, HF_HUB_OFFLINE=1), "
            "or set pre_trained=False for random weights."
        )
        raise RuntimeError(msg) from error


def _find_levels(name: str, layers: Sequence[int | str]) -> list[int]:
    """Indices of timm's feature levels at the given strides or of the given names."""
    if not timm.is_model(name.partition(".")[0]):
        similar = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:5]
        msg = f"backbone {name!r} is not a timm model" + (f"; similar names: {', '.join(similar)}" if similar else "")
        raise ValueError(msg)
    try:
        with torch.device("meta"):
            info = _create_model(name, pretrained=False).feature_info
    except (RuntimeError, AttributeError, AssertionError) as error:
        msg = f"backbone {name!r} gives no feature maps in timm ({error}); use a convolutional network such as resnet18"
        raise ValueError(msg) from error
    strides, names = info.reduction(), info.module_name()
    missing = [layer for layer in layers if layer not in strides and layer not in names]
    if missing:
        msg = (
            f"backbone {name!r} has no feature level {', '.join(map(str, missing))}; it has levels "
            f"{', '.join(names)} at strides {', '.join(map(str, strides))}. "
            f"Choose a backbone with {', '.join(map(str, layers))}, such as resnet18, mobilenetv1_100 or convnext_atto."
        )
        raise ValueError(msg)
    # The last level of a stride is the deepest.
    last = {**{stride: i for i, stride in enumerate(strides)}, **{level: i for i, level in enumerate(names)}}
    return [last[layer] for layer in layers]
