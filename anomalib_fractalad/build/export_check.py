# SPDX-License-Identifier: Apache-2.0
"""Whether exported networks score and decide as torch does."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anomalib_fractalad.image_files import open_rgb, read_image
from anomalib_fractalad.inspection import Inspector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anomalib_fractalad.models.components.lightning_module import OneClassModule

FP32, INT8, ONNX = "openvino_fp32", "openvino_int8", "onnx"
FILES = {FP32: "model/fp32.xml", INT8: "model/int8.xml", ONNX: "model/model.onnx"}
MARGIN = 1e-6  # another processor may round otherwise
ROUNDING = 1e-5  # of one image's score, by itself and in a batch as when the threshold was found

_Prediction = dict[str, Any]


def check_exports(
    model: "OneClassModule",
    folder: Path,
    names: Sequence[str],
    images: Sequence[Path],
    calibration: Collection[Path] = (),
) -> dict[str, Any]:
    """Compare exported networks with torch.

    Args:
        model: The model that was exported.
        folder: The part folder.
        names: Which of its exports to check.
        images: Image files.
        calibration: Those of the good images that the threshold was found with.

    Returns:
        ``images``, their number, and for each export ``score`` and ``map``, the largest differences, ``threshold``,
        and ``decisions_changed``, the images that are decided otherwise at that threshold; nothing for ONNX without
        ONNX Runtime.
    """
    runs: dict[str, Callable[[Path], _Prediction]] = {
        name: _in_openvino(folder, name) for name in names if name in {FP32, INT8}
    }
    if find_spec("onnxruntime") is not None and ONNX in names:
        runs[ONNX] = _in_onnx_runtime(folder)
    threshold = float(model.post_processor.normalized_image_threshold)  # type: ignore[union-attr,arg-type]
    expected: list[_Prediction] = []
    found: dict[str, Comparison] = {name: Comparison() for name in runs}
    with _evaluating(model):
        for path in images:
            prediction = _in_torch(model, path)
            score = prediction["pred_score"]
            expected.append({"path": str(path), "pred_score": score, "calibrates": path in calibration})
            for name, run in runs.items():
                found[name].add(prediction, run(path))
    check = {name: comparison.result(expected, threshold) for name, comparison in found.items()}
    return {"images": len(images), **{name: check.get(name) for name in names}}


class Comparison:
    """What a runtime makes of the images that torch has seen, too."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.map_difference = 0.0

    def add(self, expected: _Prediction, prediction: _Prediction) -> None:
        """Take in what torch and the runtime make of an image."""
        self.scores.append(prediction["pred_score"])
        difference = np.abs(expected["anomaly_map"] - prediction["anomaly_map"]).max()
        self.map_difference = max(self.map_difference, float(difference))

    def result(self, expected: Sequence[_Prediction], threshold: float) -> dict[str, Any]:
        """Compare decisions, at a threshold that is not below the scores of those images that are torch's threshold.

        Conformal calibration makes the score of an image the threshold. Rounding may bring it out just above, here or
        in torch, and it would raise an alarm that the promise does not allow for.
        """
        pairs = list(zip(expected, self.scores, strict=True))

        def is_threshold(ours: _Prediction) -> bool:
            beside = abs(ours["pred_score"] - threshold)
            return bool(beside == 0 or (ours["calibrates"] and beside < ROUNDING))

        ties = [score + MARGIN for ours, score in pairs if is_threshold(ours) and score > threshold]
        own = max([threshold, *ties])
        changed = [
            ours["path"]
            for ours, score in pairs
            if (ours["pred_score"] > threshold and not is_threshold(ours)) != (score > own)
        ]
        return {
            "score": max(abs(ours["pred_score"] - score) for ours, score in pairs),
            "map": self.map_difference,
            "threshold": own,
            "decisions_changed": changed,
        }


@contextmanager
def _evaluating(model: "OneClassModule") -> "Iterator[None]":
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _in_torch(model: "OneClassModule", path: Path) -> _Prediction:
    image = torch.as_tensor(read_image(path, as_tensor=True)).unsqueeze(0).to(model.device)
    return _plain({name: value.cpu().numpy() for name, value in model(image)._asdict().items()})


def _in_openvino(folder: Path, name: str) -> Callable[[Path], _Prediction]:
    inspector = Inspector(folder, network=FILES[name])
    return lambda path: inspector.predict(open_rgb(path))


def _in_onnx_runtime(folder: Path) -> Callable[[Path], _Prediction]:
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(folder / FILES[ONNX], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(path: Path) -> _Prediction:
        image = np.asarray(read_image(path, as_tensor=True))[None]
        return _plain(dict(zip(names, session.run(None, {"input": image}), strict=True)))

    return run


def _plain(outputs: Mapping[str, Any]) -> _Prediction:
    return {
        "pred_score": float(np.squeeze(outputs["pred_score"])),
        "pred_label": bool(np.squeeze(outputs["pred_label"])),
        "anomaly_map": np.squeeze(outputs["anomaly_map"]),
    }
