# SPDX-License-Identifier: Apache-2.0
"""Every model in every runtime, in the same way: one image of one size, float32 to INT8."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_fractalad.benchmark.surroundings import trusted_files, working_directory
from anomalib_fractalad.export.int8 import calibration_images, quantize
from anomalib_fractalad.export.module import ExportModule

# Processors that can would compute in bfloat16 what is in floating point, in FP32 models and in INT8 ones.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
# torch's exporter writes opset 18. A batch of any size would be traced with two images, and PatchCore's search frozen
# for two: one image of one size is what every model can be exported for.
ONE_IMAGE = {"opset_version": 18, "dynamic_shapes": None}

Inferencer = TorchInferencer | OpenVINOInferencer


class _NamingInferencer(OpenVINOInferencer):
    """Knows each output by its own name: a compiled one also has those of layers that were merged into it."""

    @staticmethod
    def post_process(predictions: Any) -> dict[str, Any]:
        names = (set(InferenceBatch._fields) & known for known in predictions.names())
        return {name.pop(): value for name, value in zip(names, predictions.to_tuple(), strict=True)}


def resized(model: AnomalibModule, image: Tensor) -> Tensor:
    """An image of the size that a model resizes to, as the model itself would resize it.

    Args:
        model: The model.
        image: (3, H, W), values in [0, 1].

    Returns:
        (3, h, w), values in [0, 1]; the image itself if the pre-processor does not resize.
    """
    transform = getattr(model.pre_processor, "transform", None)
    resizes = extract_transforms_by_type(transform, Resize) if transform is not None else []
    image = image.as_subclass(Tensor)
    return resizes[0](image).clamp(0, 1) if resizes else image


def export(
    model: AnomalibModule,
    runtime: str,
    folder: Path,
    size: tuple[int, int],
    calibration: AnomalibDataModule | Sequence[np.ndarray],
) -> Path:
    """Export a model for a runtime, for one image of one size.

    INT8 is one recipe, with one choice of calibration images, for all models: for those of the package it is what
    their own export gives.

    Args:
        model: A trained model.
        runtime: torch, openvino_fp32, openvino_fp16 or openvino_int8.
        folder: Folder to export into; the files are named after the runtime.
        size: Height and width of the image, see :func:`resized`.
        calibration: For INT8, data with training images, or images (1, 3, H, W) with values in [0, 1].

    Returns:
        The file, .pt or .xml.

    Raises:
        RuntimeError: If anomalib exports nothing.
    """
    engine = Engine(default_root_dir=folder, accelerator="cpu")
    if runtime == "torch":
        return _exists(engine.export(model, ExportType.TORCH, folder, model_file_name=runtime), runtime)
    arguments: dict[str, Any] = {"input_size": size, "onnx_kwargs": {**ONE_IMAGE, "verbose": False}}
    int8 = runtime == "openvino_int8"
    if int8 and isinstance(model, ExportModule) and isinstance(calibration, AnomalibDataModule):
        arguments |= {"compression_type": CompressionType.INT8_PTQ, "datamodule": calibration}
        int8 = False
    elif runtime == "openvino_fp16":
        arguments["compression_type"] = CompressionType.FP16
    name = f"{runtime}_before" if int8 else runtime
    file = _exists(engine.export(model, ExportType.OPENVINO, folder, model_file_name=name, **arguments), runtime)
    return _quantized(model, file, runtime, calibration) if int8 else file


def _exists(file: Path | None, runtime: str) -> Path:
    if file is None:
        msg = f"anomalib exported no file for {runtime}"
        raise RuntimeError(msg)
    return file


def _quantized(
    model: AnomalibModule, file: Path, runtime: str, calibration: AnomalibDataModule | Sequence[np.ndarray]
) -> Path:
    import openvino  # noqa: PLC0415  an extra

    images = calibration_images(calibration) if isinstance(calibration, AnomalibDataModule) else calibration
    network = openvino.Core().read_model(file)
    quantized = quantize(network, [resized(model, torch.from_numpy(image)).numpy() for image in images])
    target = file.with_name(f"{runtime}.xml")
    openvino.save_model(quantized, target, compress_to_fp16=False)
    return target


def load(file: Path, runtime: str, device: str = "cpu", threads: int | None = None) -> Inferencer:
    """Load an exported model.

    Args:
        file: The file, .pt or .xml.
        runtime: The runtime that it was exported for; openvino_fp32 computes in FP32, openvino_int8 in INT8 and FP32.
        device: Type of the device for torch; OpenVINO runs on the CPU.
        threads: CPU threads of OpenVINO; left out, it chooses.
    """
    if runtime == "torch":
        with trusted_files():
            return TorchInferencer(file, device)
    config: dict[str, Any] = {} if runtime == "openvino_fp16" else dict(FLOAT32)
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    with working_directory(file.parent):  # the inferencer makes its cache there
        return _NamingInferencer(file, "CPU", config)


def as_input(image: Tensor, runtime: str) -> Tensor | np.ndarray:
    """An image (3, H, W) as a runtime's inferencer takes it: OpenVINO's is an array (H, W, 3)."""
    return image if runtime == "torch" else image.permute(1, 2, 0).numpy()


@torch.inference_mode()
def seconds_each(
    inferencer: Inferencer, inputs: Iterable[Any], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Time each prediction but the first.

    Args:
        inferencer: A loaded model.
        inputs: Images, or batches of images.
        clock: Tells seconds; :func:`time.process_time` those of the CPU, which other processes do not lengthen.

    Returns:
        Seconds.
    """
    seconds = []
    for image in inputs:
        start = clock()
        torch.as_tensor(inferencer.predict(image).pred_score).cpu()  # waits for the device
        seconds.append(clock() - start)
    return seconds[1:]


def images_per_second(inferencer: Inferencer, images: Sequence[Any], repetitions: int) -> float:
    """Throughput of several images at once: a batch in torch, and as many requests under way in OpenVINO.

    Args:
        inferencer: A loaded model.
        images: The images, as the inferencer takes them, of one size.
        repetitions: How often they are predicted; the median counts.

    Returns:
        Images per second.
    """
    if isinstance(inferencer, TorchInferencer):
        return len(images) / statistics.median(
            seconds_each(inferencer, [torch.stack(list(images))] * (repetitions + 1))
        )
    from openvino import AsyncInferQueue  # noqa: PLC0415  an extra

    queue = AsyncInferQueue(inferencer.model, len(images))
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        for image in images:
            queue.start_async({0: inferencer.pre_process(image)})
        queue.wait_all()
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.median(seconds[1:])
