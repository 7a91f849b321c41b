# SPDX-License-Identifier: Apache-2.0
"""Size, latency and image AUROC of one model in one runtime."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from torch import Tensor

from anomalib_fractalad.benchmark.exports import as_input, export, images_per_second, load, resized, seconds_each
from anomalib_fractalad.benchmark.quality import Score, auroc

IMAGES_AT_ONCE = 8


def speed(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    runtime: str,
    device: str,
    threads: int | None,
    repetitions: int,
    root: Path,
    scores: Sequence[Score],
) -> dict[str, Any]:
    """Export a model for a runtime, and time it from an image in memory, of the size it resizes to, to score and map.

    Args:
        model: A trained model.
        datamodule: Its data.
        runtime: Name of the runtime.
        device: Type of the device for the runtime torch; OpenVINO runs on the CPU.
        threads: CPU threads of OpenVINO; left out, it chooses.
        repetitions: Number of timed predictions.
        root: Folder for the exported files.
        scores: The test images' scores as the network gives them.

    Returns:
        Size of the files, latency, throughput and, for OpenVINO, the precision that it computes in and image AUROC.

    Raises:
        ValueError: If the model sees images of several sizes.
    """
    test_data = datamodule.test_data
    images = [_image(model, test_data, i) for i in range(min(IMAGES_AT_ONCE, len(test_data)))]
    height, width = images[0].shape[-2:]
    with nothing_clamped(model.post_processor, [score for *_, score in scores]):
        file = export(model, runtime, root, (height, width), datamodule)
    inferencer: Any = load(file, runtime, device, threads)
    size = sum(path.stat().st_size for path in file.parent.glob(f"{runtime}.*"))
    result: dict[str, Any] = {"file_mb": size / 2**20, "input_size": [height, width]}
    if runtime == "torch":
        result["device"] = device
    else:
        result["precision"] = inferencer.model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        result["image_AUROC"] = _exported_auroc(model, test_data, inferencer, (height, width))
    inputs = [as_input(_of_size(image, (height, width)), runtime) for image in images]
    seconds = seconds_each(inferencer, islice(cycle(inputs), repetitions + 1))
    at_once = list(islice(cycle(inputs), IMAGES_AT_ONCE))
    return {
        **result,
        "latency_ms": 1e3 * statistics.median(seconds),
        "latency_90_ms": 1e3 * float(np.quantile(seconds, 0.9)),
        "images_per_second": images_per_second(inferencer, at_once, repetitions // IMAGES_AT_ONCE + 1),
    }


def _exported_auroc(model: AnomalibModule, test_data: Any, inferencer: Any, size: tuple[int, int]) -> float:
    scores = []
    for i, path in enumerate(test_data.samples.image_path):
        image = as_input(_of_size(_image(model, test_data, i), size, path), "openvino")
        scores.append(float(np.asarray(inferencer.predict(image).pred_score).item()))
    return auroc(list(test_data.samples.label_index), scores)


def _image(model: AnomalibModule, test_data: Any, index: int) -> Tensor:
    return resized(model, test_data[index].image)


def _of_size(image: Tensor, size: tuple[int, int], path: str = "a test image") -> Tensor:
    if image.shape[-2:] != size:
        height, width = image.shape[-2:]
        msg = (
            f"the model was exported for images of {size[0]} x {size[1]}, and sees {path} in {height} x {width}; give "
            "image_size, or a pre-processor that resizes to one height and width"
        )
        raise ValueError(msg)
    return image


@contextlib.contextmanager
def nothing_clamped(post_processor: Any, scores: Sequence[float]) -> Iterator[None]:
    """Widen the range that scores are normalized by, so that those of an export do not tie at 0 or 1.

    anomalib's post-processing clamps what lies half a range or more above the threshold. The network's work stays the
    same: two constants change.

    Args:
        post_processor: A model's; one that is not anomalib's, or has no thresholds, is left alone.
        scores: The scores that are not to be clamped.
    """
    if not isinstance(post_processor, PostProcessor) or post_processor.image_threshold.isnan() or not scores:
        yield
        return
    low, high = post_processor.image_min, post_processor.image_max
    before = low.clone(), high.clone()
    threshold = float(post_processor.image_threshold)
    reach = 1.1 * max(abs(score - threshold) for score in scores)
    if not 2 * reach <= float(high - low):
        low.copy_(torch.as_tensor(threshold - reach))
        high.copy_(torch.as_tensor(threshold + reach))
    try:
        yield
    finally:
        low.copy_(before[0])
        high.copy_(before[1])
