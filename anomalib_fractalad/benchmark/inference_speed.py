# SPDX-License-Identifier: Apache-2.0
"""Latency of one image, end to end, beside DRAEM and PatchCore, runtimes interleaved in one run.

Run as ``python -m anomalib_fractalad.benchmark.inference_speed``.
"""

import logging
import os
import statistics
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from jsonargparse import auto_cli
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import Resize

from anomalib_fractalad.benchmark.config import RUNTIMES
from anomalib_fractalad.benchmark.measure import COMPRESSION, Inferencer, openvino_inferencer, seconds_each
from anomalib_fractalad.models.components import check_positive
from anomalib_fractalad.registration import MODELS


def inference_speed(
    backbone: str = "resnet18",
    image_size: int = 256,
    repetitions: int = 15,
    threads: int = 1,
    models: tuple[str, ...] = tuple(MODELS),
    runtimes: tuple[str, ...] = RUNTIMES,
    others: tuple[str, ...] = ("Draem", "Patchcore"),
    arguments: dict[str, dict[str, Any]] | None = None,
    memory_items: int = 10_000,
    sizes: dict[str, int] | None = None,
) -> dict[str, float]:
    """Print the median latency of one image in memory, with pre- and post-processing, and ratios.

    Weights are random: they do not change the time. PatchCore has a WideResNet-50 unless told otherwise. Of the
    runtimes, openvino_fp32 computes in FP32, openvino_fp16 in what OpenVINO chooses: bfloat16 where the processor can.

    Args:
        backbone: Name of a timm model, for the package's models.
        image_size: Height and width of the image, and of what the networks see, in pixels.
        repetitions: Number of timed predictions by each, after one that is not timed.
        threads: Number of CPU threads, for torch and OpenVINO.
        models: Models of the package to time in every runtime.
        runtimes: Runtimes for the package's models, torch among them.
        others: Models of anomalib to time in torch.
        arguments: Further arguments of models, by the model's name, such as {"AAND": {"strides": [8, 16]}}.
        memory_items: Size of PatchCore's memory.
        sizes: Height and width that single models resize the image to, by the model's name.

    Returns:
        Median seconds by model and runtime. Printed beside them: the network's work, and the rate that comes of it, to
        be compared with the rate of a large matrix product.

    Raises:
        ValueError: If arguments or sizes are given for a model that is not timed, a size or the memory is 0 or less, or
            the runtimes are unknown or lack torch.
    """
    arguments, sizes = arguments or {}, sizes or {}
    wanted = {**dict.fromkeys(models, runtimes), **dict.fromkeys(others, ("torch",))}
    check_positive(memory_items=memory_items, image_size=image_size, **sizes)
    _check(runtimes, wanted, arguments=arguments, sizes=sizes)
    warnings.filterwarnings("ignore")
    logging.getLogger("anomalib").setLevel(logging.ERROR)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    os.environ["TRUST_REMOTE_CODE"] = "1"  # the files are written below
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image = torch.rand(3, image_size, image_size)
    pictures: dict[str, Any] = {"torch": image, "openvino": image.permute(1, 2, 0).numpy()}
    with TemporaryDirectory() as temporary:
        inferencers, flops = {}, {}
        for name, where in wanted.items():
            size = sizes.get(name, image_size)
            model = _make(name, backbone, size, arguments.get(name, {}), memory_items)
            flops[name] = _gigaflops(model, size)
            for runtime in where:
                inferencers[name, runtime] = _export(model, runtime, Path(temporary) / name, image, threads)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in inferencers}
        for _ in range(repetitions):
            for key, inferencer in inferencers.items():
                picture = pictures[key[1].partition("_")[0]]
                seconds[key] += seconds_each(inferencer, [picture, picture])
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    print(f"{backbone}, one image of {image_size} x {image_size}, {threads} CPU thread(s)")
    for name, size in sizes.items():
        print(f"{name} resizes it to {size} x {size}")
    print(f"a large matrix product in FP32 reaches {_matrix_rate():.0f} GFLOP/s")
    _print_table(medians, flops, models, others)
    return {f"{name} {runtime}": median for (name, runtime), median in medians.items()}


def _check(runtimes: Collection[str], wanted: Collection[str], **by_name: Mapping[str, Any]) -> None:
    if "torch" not in runtimes or not set(runtimes) <= set(RUNTIMES):
        msg = f"runtimes is {', '.join(runtimes)}; it must be of {', '.join(RUNTIMES)}, torch among them"
        raise ValueError(msg)
    for what, values in by_name.items():
        if unknown := sorted(values.keys() - set(wanted)):
            msg = f"{what} are for {', '.join(unknown)}; timed are {', '.join(wanted)}"
            raise ValueError(msg)


def _print_table(
    medians: Mapping[tuple[str, str], float],
    flops: Mapping[str, float],
    models: Collection[str],
    others: Collection[str],
) -> None:
    for (name, runtime), median in medians.items():
        rate = flops[name] / median
        print(f"{name:10} {runtime:14} {1e3 * median:9.1f} ms {flops[name]:7.1f} GFLOP {rate:7.0f} GFLOP/s", end="")
        if name in models:
            print(f"{median / medians[name, 'torch']:8.2f} x torch", end="")
            if runtime == "openvino_int8" and (name, "openvino_fp32") in medians:
                print(f"{median / medians[name, 'openvino_fp32']:8.2f} x FP32", end="")
            for other in others if runtime != "torch" else ():
                print(f"   {other} takes {medians[other, 'torch'] / median:.1f} x as long", end="")
        print()


def _make(name: str, backbone: str, image_size: int, given: Mapping[str, Any], memory_items: int) -> AnomalibModule:
    arguments: dict[str, Any] = {
        "evaluator": False,
        "visualizer": False,
        "pre_processor": PreProcessor(transform=Resize((image_size, image_size), antialias=True)),
    }
    if name in MODELS or name == "Patchcore":
        arguments |= {"backbone": backbone if name in MODELS else "wide_resnet50_2", "pre_trained": False}
    if name == "Draem":
        arguments["dtd_dir"] = Path(__file__).parent  # a folder without images, in place of a download
    model = get_model(name, **{**arguments, **given})
    if name == "Patchcore":
        _fill_memory(model, memory_items)
    _set_thresholds(model)
    return model


def _fill_memory(model: AnomalibModule, items: int) -> None:
    network: Any = model.eval().model
    features = network.feature_extractor(torch.rand(1, 3, 64, 64))
    network.memory_bank = torch.rand(items, sum(layer.shape[1] for layer in features.values()))


def _set_thresholds(model: AnomalibModule) -> None:
    """Give the post-processor of an untrained model the range [0, 1], and 0.5 as threshold."""
    for name, value in cast("PostProcessor", model.post_processor).named_buffers():
        value.fill_({"max": 1.0, "min": 0.0}.get(name[-3:], 0.5))
    model.eval()


def _export(model: AnomalibModule, runtime: str, folder: Path, image: Tensor, threads: int) -> Inferencer:
    file = Engine(default_root_dir=folder, accelerator="cpu").export(
        model,
        ExportType.TORCH if runtime == "torch" else ExportType.OPENVINO,
        export_root=folder,
        model_file_name=runtime,
        compression_type=COMPRESSION.get(runtime),
        datamodule=_Pictures(image),  # type: ignore[arg-type]
    )
    return (
        TorchInferencer(str(file), "cpu")
        if runtime == "torch"
        else openvino_inferencer(Path(str(file)), runtime, threads)
    )


def _gigaflops(model: AnomalibModule, size: int) -> float:
    """Multiplications and additions of the convolutions and matrix products, in 10^9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.rand(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def _matrix_rate(size: int = 1024, repetitions: int = 10) -> float:
    matrix, seconds = torch.rand(size, size), []
    for _ in range(repetitions):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


class _Pictures(LightningDataModule):
    """Pictures to calibrate INT8 with; which ones does not change the time."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            cast("Any", [self.image] * 8), batch_size=1, collate_fn=lambda items: {"image": np.stack(items)}
        )


if __name__ == "__main__":
    auto_cli(inference_speed, as_positional=False)
