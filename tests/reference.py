# SPDX-License-Identifier: Apache-2.0
"""Formula-made weights and inputs for which the published implementations gave the numbers in ``golden``."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent / "golden"


def wave(shape: Sequence[int], phase: float, freq: float = 0.7) -> torch.Tensor:
    return torch.sin(freq * torch.arange(math.prod(shape), dtype=torch.float64) + phase).reshape(shape)


def parameters(file: str, rename: Callable[[str], str], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """The state dict of the parameters in a golden JSON file, under our names."""
    entries: list[dict[str, Any]] = json.loads((GOLDEN / file).read_text())["parameters"]
    return {rename(entry["name"]): _value(entry, scale) for entry in entries}


def _value(entry: dict[str, Any], scale: float) -> torch.Tensor:
    values = wave(entry["shape"], entry["phase"])
    kind = entry["name"].rpartition(".")[2]
    if kind == "memory":
        return values
    if kind == "running_mean":
        return 0.05 * values
    if kind == "running_var":
        return 1 + 0.1 * values
    if kind == "bias":
        return 0.1 * values
    if len(entry["shape"]) == 1:
        return 1 + 0.1 * values
    return scale * values / math.sqrt(math.prod(entry["shape"][1:]))
