# SPDX-License-Identifier: Apache-2.0
"""Scores of images by the finished model, and small versions of some of them for the report."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import Tensor

from anomalib_fractalad.image_files import open_rgb

from .evaluation import device_of
from .split import data_module
from .trials import Trial

_SIDE = 224  # longest side in pixels of an image in the report
_SHOWN = {"good": 60, "bad": 90, "synthetic": 60}
_CLEAR = 0.38  # normalized map below which a heat map is transparent


def score_images(
    model: AnomalibModule,
    folder: Path,
    good: Sequence[Path],
    bad: Sequence[Path],
    trials: Sequence[Trial],
    *,
    accelerator: str = "auto",
    show: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Score images with the finished model.

    Args:
        model: The model, with its thresholds.
        folder: What the names of good images are below of.
        good: Calibration images.
        bad: Bad images.
        trials: Calibration images with synthetic defects.
        accelerator: Where the model runs.
        show: Called with how far it is.

    Returns:
        For each image ``group`` (good, bad, synthetic), ``name``, normalized ``score`` with the threshold at 0.5, and
        ``image`` and ``map`` for those nearest to the threshold and an even selection of the others.
    """
    known: dict[str, dict[str, Any]] = {}
    for file in good:
        known[str(file.resolve())] = {"group": "good", "name": file.relative_to(folder).as_posix()}
    for file in bad:
        known[str(file.resolve())] = {"group": "bad", "name": f"{file.parent.name}/{file.name}"}
    for trial in trials:
        if trial.kind is not None:
            name = f"{trial.kind} at {trial.severity:.0%}, image {trial.source + 1}"
            known[str(Path(trial.file).resolve())] = {"group": "synthetic", "name": name}
    heats = _score(model, known, accelerator, show)
    rows = list(known.values())
    for row in _selected(rows):
        show("drawing images")
        row["image"] = _small(Path(row["path"]))
        row["map"] = _heat(heats[row["path"]])
    return [{name: value for name, value in row.items() if name != "path"} for row in rows]


@torch.inference_mode()
def _score(
    model: AnomalibModule, known: dict[str, dict[str, Any]], accelerator: str, show: Callable[[str], object]
) -> dict[str, npt.NDArray[np.uint8]]:
    """Give each row its path and score; maps at a small size, by path."""
    data = data_module([], [Path(path) for path in known])
    data.test_augmentations = cast("PreProcessor", model.pre_processor).transform
    data.setup()
    device = device_of(accelerator)
    model.to(device).eval()
    maps = {}
    for batch in data.test_dataloader():
        found = model(batch.image.to(device))
        for path, score, anomaly_map in zip(
            batch.image_path, found.pred_score.flatten(), found.anomaly_map, strict=True
        ):
            known[path] |= {"path": path, "score": float(score)}
            maps[path] = _levels(anomaly_map)
        show(f"scoring image {len(maps)} of {len(known)}")
    model.cpu()
    return maps


def _levels(anomaly_map: Tensor) -> npt.NDArray[np.uint8]:
    values = anomaly_map.squeeze().float().cpu().numpy()
    scale = min(1.0, _SIDE / 2 / max(values.shape))
    size = [max(1, round(length * scale)) for length in values.shape[::-1]]
    return (255 * cv2.resize(values, size, interpolation=cv2.INTER_AREA)).clip(0, 255).astype(np.uint8)


def _selected(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows to show: of each group, half those nearest to the threshold, half evenly from the highest to the lowest."""
    selected = []
    for group, most in _SHOWN.items():
        members = sorted((row for row in rows if row["group"] == group), key=lambda row: abs(row["score"] - 0.5))
        near, rest = members[: most // 2], sorted(members[most // 2 :], key=lambda row: -row["score"])
        step = max(1.0, len(rest) / (most - len(near))) if rest else 1.0
        selected += near + [rest[int(place * step)] for place in range(int(len(rest) / step))]
    return selected


def _small(file: Path) -> str:
    image = open_rgb(file)
    image.thumbnail((_SIDE, _SIDE))
    return _address(image, "JPEG", quality=82)


def _heat(levels: npt.NDArray[np.uint8]) -> str:
    """A map in colors, transparent where it is low, opaque from the threshold on."""
    colors = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    share = (levels / 255 - _CLEAR) / (0.5 - _CLEAR)
    alpha = (255 * share.clip(0, 1)).astype(np.uint8)
    return _address(Image.fromarray(np.dstack([colors, alpha])), "WEBP", quality=70)


def _address(image: Image.Image, kind: str, **options: Any) -> str:
    """An image as an address that holds it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
