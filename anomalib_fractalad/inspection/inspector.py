# SPDX-License-Identifier: Apache-2.0
"""Inspection of images with a part folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from .reading import UnreadableImageError, open_rgb

if TYPE_CHECKING:
    from collections.abc import Iterable

FIELDS = ("image", "score", "decision", "defects", "milliseconds", "error")


class Inspector:
    """Inspects images with a part folder.

    Args:
        part: The folder; it holds ``part.json``.
        device: OpenVINO's device.
        threshold: Normalized scores above it are anomalous; left out, the part's.
        network: A file in the folder to use in place of the part's choice.

    Attributes:
        part: The content of ``part.json``.

    Raises:
        FileNotFoundError: If the folder is no part folder.
        ValueError: If the folder is damaged, or the device cannot run the network.
    """

    def __init__(
        self, part: str | Path, device: str = "CPU", threshold: float | None = None, network: str | None = None
    ) -> None:
        file = Path(part) / "part.json"
        if not file.is_file():
            msg = f"{part} is no part folder: it holds no part.json"
            raise FileNotFoundError(msg)
        try:
            self.part: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            path = Path(part) / (network or self.part["network"])
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{file} is damaged ({error!r}): copy the part folder anew, or build it anew"
            raise ValueError(msg) from error
        self.threshold = threshold
        from openvino import Core  # noqa: PLC0415

        # On processors with bfloat16, OpenVINO would compute in it, and scores would differ from those in training.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        core = Core()
        try:
            model = core.read_model(str(path))
        except RuntimeError as error:
            msg = f"{path}, or the .bin file beside it, is damaged: copy the part folder anew, or build it anew"
            raise ValueError(msg) from error
        try:
            compiled = core.compile_model(model, device, settings)
        except RuntimeError as error:
            msg = f"--device {device} cannot run {path}; OpenVINO finds {', '.join(core.available_devices)}: {error}"
            raise ValueError(msg) from error
        self.request = compiled.create_infer_request()
        self.outputs = {name: i for i, output in enumerate(compiled.outputs) for name in output.get_names()}

    def predict(self, image: Image.Image) -> dict[str, Any]:
        """Run the network.

        Args:
            image: In RGB of 8 bits.

        Returns:
            ``pred_score``, a number, ``pred_label``, and ``anomaly_map`` and ``pred_mask``, arrays (h, w); scores and
            maps lie in [0, 1] with the threshold at 0.5, unless sensitivities moved it.

        Raises:
            UnreadableImageError: If the part has a region of interest of other proportions.
        """
        self._check_proportions(image.size)
        pixels = np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        self.request.infer([np.ascontiguousarray(pixels)], share_inputs=True)
        found = {name: np.squeeze(self.request.get_output_tensor(i).data) for name, i in self.outputs.items()}
        names = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
        score, label, *maps = (found[name] for name in names if name in found)
        anomalous = bool(label) if self.threshold is None else float(score) > self.threshold
        return dict(zip(names, (float(score), anomalous, *maps), strict=False))

    def _check_proportions(self, size: tuple[int, int]) -> None:
        if self.part.get("roi"):
            (width, height), (rows, columns) = size, self.part["roi"]["size"]
            if abs(width * rows - height * columns) > max(width, height, rows, columns):
                msg = f"has {width}x{height} pixels, and the region of interest was drawn on {columns}x{rows}"
                raise UnreadableImageError(msg)

    def inspect(self, path: str | Path, heat_map: Path | None = None) -> dict[str, Any]:
        """Inspect an image file.

        Args:
            path: The file.
            heat_map: A PNG file to draw the heat map and the boxes of defects to, over the image.

        Returns:
            ``image``, ``score`` in [0, 1], ``decision`` (good, anomalous or unreadable), ``defects``, ``milliseconds``
            from file to decision, and ``error``. Defects are those of an anomalous image, the largest first: ``box``
            (left, top, right, bottom; the last two just outside) and ``area``, in pixels of the image.
        """
        row: dict[str, Any] = dict.fromkeys(FIELDS) | {"image": str(path), "decision": "unreadable", "defects": []}
        start = time.perf_counter()
        try:
            image = open_rgb(path)
            found = self.predict(image)
            row |= {"score": found["pred_score"], "decision": "anomalous" if found["pred_label"] else "good"}
            if found["pred_label"] and "pred_mask" in found:
                row["defects"] = find_defects(found["pred_mask"], image.size)
            row["milliseconds"] = round(1000 * (time.perf_counter() - start), 2)
            if heat_map is not None and "anomaly_map" in found:
                heat_map.parent.mkdir(parents=True, exist_ok=True)
                draw_heat_map(image, found["anomaly_map"], row["defects"]).save(heat_map, "PNG")
        except (OSError, MemoryError, RuntimeError, ValueError) as error:
            row["error"] = " ".join(str(error).split()) or type(error).__name__
        return row


def find_defects(mask: np.ndarray, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Find the connected parts of a mask, corners included.

    Args:
        mask: (h, w), nonzero at defects.
        size: Width and height of the image that it stands for.

    Returns:
        ``box`` and ``area`` of each in pixels of the image, the largest first.
    """
    edges = np.diff(np.pad(np.asarray(mask, dtype=bool).astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    if not len(rows):
        return []
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0  # of the runs in the row before, the first that may still touch
    for run in range(len(rows)):
        while above < run and (rows[above] < rows[run] - 1 or (rows[above] < rows[run] and ends[above] < starts[run])):
            above += 1
        other = above
        while rows[other] < rows[run] and starts[other] <= ends[run]:
            parent[root(other)] = root(run)
            other += 1
    labels = np.unique([root(run) for run in range(len(rows))], return_inverse=True)[1].ravel()
    scale = np.array(size) / np.array(mask.shape)[::-1]
    areas = np.bincount(labels, ends - starts) * scale.prod()
    defects = []
    for label in np.argsort(-areas, kind="stable"):
        own = labels == label
        low = np.floor(scale * (starts[own].min(), rows[own].min()) + 1e-9).astype(int)
        high = np.ceil(scale * (ends[own].max(), rows[own].max() + 1) - 1e-9).astype(int)
        defects.append({"box": [*low.tolist(), *high.tolist()], "area": max(round(float(areas[label])), 1)})
    return defects


def draw_heat_map(image: Image.Image, anomaly_map: np.ndarray, defects: Iterable[dict[str, Any]] = ()) -> Image.Image:
    """Lay a heat map over an image: nothing where it is low, yellow at the threshold, red above.

    Args:
        image: In RGB.
        anomaly_map: (h, w), values in [0, 1], with the threshold at 0.5.
        defects: What :func:`find_defects` has found, to be framed.
    """
    heat = Image.fromarray(np.asarray(anomaly_map, dtype=np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    value = np.asarray(heat)[..., None].clip(0, 1)
    color = np.concatenate([np.ones_like(value), (2 - 2 * value).clip(0, 1), np.zeros_like(value)], axis=-1)
    strength = 0.7 * (2 * value).clip(0, 1)
    drawn = Image.fromarray(((1 - strength) * np.asarray(image) + strength * 255 * color).round().astype(np.uint8))
    draw, width = ImageDraw.Draw(drawn), max(1, min(image.size) // 200)
    for left, top, right, bottom in (defect["box"] for defect in defects):
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=(255, 0, 0), width=width)
    return drawn
