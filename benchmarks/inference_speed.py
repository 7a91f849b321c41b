# SPDX-License-Identifier: Apache-2.0
"""Latency of one image, end to end, of the package's models and anomalib's, all in every runtime, in one run.

Run as ``python benchmarks/inference_speed.py``.
"""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import Resize

from anomalib_fractalad.benchmark.config import RUNTIMES
from anomalib_fractalad.benchmark.exports import Inferencer, as_input, export, load, seconds_each
from anomalib_fractalad.benchmark.surroundings import cpu_threads, quiet
from anomalib_fractalad.export.memory import CHATTY
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training.loggers import LIGHTNING

NOISE = {"dtd_dir": Path(__file__).parent}  # a folder without images, in place of a download: anomalies come from noise
CALIBRATION_IMAGES = 2  # which ones, and how many, does not change the time


def inference_speed(
    backbone: str = "resnet18",
    image_size: int = 256,
    repetitions: int = 15,
    threads: int = 1,
    models: tuple[str, ...] = (*MODELS, "Draem", "Patchcore"),
    runtimes: tuple[str, ...] = RUNTIMES,
    arguments: dict[str, dict[str, Any]] | None = None,
    memory_items: int = 10_000,
    sizes: dict[str, int] | None = None,
    cpu_time: bool = False,
) -> dict[str, float]:
    """Print the median latency of one image in memory, with pre- and post-processing, and ratios.

    Weights are random: they do not change the time. PatchCore has a WideResNet-50 unless told otherwise. Every model is
    exported in the same way: openvino_fp32 computes in FP32, openvino_fp16 in what OpenVINO chooses. Predictions are
    interleaved. Ratios are between models in one runtime.

    Args:
        backbone: Name of a timm model, for the package's models.
        image_size: Height and width of the image, and of what the networks see, in pixels.
        repetitions: Number of timed predictions by each, each after one that is not timed.
        threads: Number of CPU threads, for torch and OpenVINO.
        models: Models of the package or of anomalib; the others are compared with the first one. What follows the first
            word tells entries of one model apart, such as "FractalMemory" and "FractalMemory with a head".
        runtimes: Runtimes to time them in.
        arguments: Further arguments, by the entry in models, such as {"AAND": {"strides": [8, 16]}}; PatchCore's
            may have a memory_items of their own.
        memory_items: Size of PatchCore's memory.
        sizes: Height and width of the image for single models, by the entry in models.
        cpu_time: Tell CPU time in place of latency: for a machine that is busy with other work.

    Returns:
        Median seconds by model and runtime. Printed beside them: the network's work, and the rate that comes of it.

    Raises:
        ValueError: If an argument is for no timed model, or is out of range.
    """
    arguments, sizes = arguments or {}, sizes or {}
    _check(models, runtimes, {"memory_items": memory_items, "image_size": image_size, **sizes}, arguments, sizes)
    loggers = ("anomalib", "anomalib_fractalad", *LIGHTNING, *CHATTY)
    with quiet(*loggers), cpu_threads(threads), TemporaryDirectory() as folder:
        timed, flops = _prepare(backbone, models, runtimes, arguments, memory_items, sizes, image_size, threads, folder)
        seconds = _interleaved(timed, repetitions, time.process_time if cpu_time else time.perf_counter)
    medians = {key: statistics.median(times) for key, times in seconds.items()}
    print(f"{backbone}, one image of {image_size} x {image_size}, {threads} CPU thread(s){', CPU time' * cpu_time}")
    for name, size in sizes.items():
        print(f"{name} has one of {size} x {size}")
    print(f"a large matrix product in FP32 reaches {_matrix_rate(threads):.0f} GFLOP/s")
    _print_table(medians, flops, models[0])
    return {f"{name} {runtime}": median for (name, runtime), median in medians.items()}


def _prepare(
    backbone: str,
    models: Collection[str],
    runtimes: Collection[str],
    arguments: Mapping[str, dict[str, Any]],
    memory_items: int,
    sizes: Mapping[str, int],
    image_size: int,
    threads: int,
    folder: str,
) -> tuple[dict[tuple[str, str], tuple[Inferencer, Any]], dict[str, float]]:
    """An inferencer and an image for each model and runtime, and each model's work."""
    torch.manual_seed(0)
    timed, flops = {}, {}
    for name in models:
        size = sizes.get(name, image_size)
        given = dict(arguments.get(name, {}))
        items = given.pop("memory_items", memory_items) if name.startswith("Patchcore") else memory_items
        model = make_model(name.split()[0], backbone, size, given, items)
        flops[name], image = _gigaflops(model, size), torch.rand(3, size, size)
        for runtime in runtimes:
            timed[name, runtime] = _load(model, runtime, Path(folder) / name, image, threads)
    return timed, flops


def _load(
    model: AnomalibModule, runtime: str, folder: Path, image: Tensor, threads: int
) -> tuple[Inferencer, Tensor | np.ndarray]:
    """An exported model, and the image as it takes one."""
    height, width = image.shape[-2:]
    calibration = [torch.rand(1, 3, height, width).numpy() for _ in range(CALIBRATION_IMAGES)]
    file = export(model, runtime, folder, (height, width), calibration)
    return load(file, runtime, threads=threads), as_input(image, runtime)


def _interleaved(
    timed: Mapping[tuple[str, str], tuple[Inferencer, Any]], repetitions: int, clock: Callable[[], float]
) -> dict[tuple[str, str], list[float]]:
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    for _ in range(repetitions):
        for key, (inferencer, image) in timed.items():
            seconds[key] += seconds_each(inferencer, [image, image], clock)
    return seconds


def _check(
    models: Collection[str],
    runtimes: Collection[str],
    positive: Mapping[str, int],
    arguments: Mapping[str, Any],
    sizes: Mapping[str, Any],
) -> None:
    for name, value in positive.items():
        if value <= 0:
            msg = f"{name} is {value}; it must be above 0"
            raise ValueError(msg)
    if not runtimes or not set(runtimes) <= set(RUNTIMES):
        msg = f"runtimes is {', '.join(runtimes) or 'empty'}; it must be of {', '.join(RUNTIMES)}"
        raise ValueError(msg)
    for what, values in (("arguments", arguments), ("sizes", sizes)):
        if unknown := sorted(values.keys() - set(models)):
            msg = f"{what} are for {', '.join(unknown)}; timed are {', '.join(models)}"
            raise ValueError(msg)


def _print_table(medians: Mapping[tuple[str, str], float], flops: Mapping[str, float], first: str) -> None:
    width = max(map(len, flops))
    for (name, runtime), median in medians.items():
        rate = flops[name] / median
        print(
            f"{name:{width}} {runtime:14} {1e3 * median:9.1f} ms {flops[name]:7.3g} GFLOP {rate:7.0f} GFLOP/s", end=""
        )
        for reference in ("torch", "openvino_fp32"):
            if runtime != reference and (name, reference) in medians:
                print(f"{median / medians[name, reference]:8.2f} x {reference}", end="")
        if name != first:
            print(f"   {median / medians[first, runtime]:.2f} x {first} {runtime}", end="")
        print()


def make_model(
    name: str, backbone: str, image_size: int, given: Mapping[str, Any], memory_items: int
) -> AnomalibModule:
    """A model with random weights that predicts; see :func:`inference_speed` for the arguments."""
    arguments: dict[str, Any] = {
        "evaluator": False,
        "visualizer": False,
        "pre_processor": PreProcessor(transform=Resize((image_size, image_size), antialias=True)),
    }
    if name in MODELS or name == "Patchcore":
        arguments |= {"backbone": backbone if name in MODELS else "wide_resnet50_2", "pre_trained": False}
    if name == "Draem":
        arguments |= NOISE
    model = get_model(name, **{**arguments, **given})
    if name == "Patchcore":
        _fill_memory(model, memory_items)
    if name == "Padim":
        _fit_gaussians(model, image_size)
    _set_thresholds(model)
    return model


def _fill_memory(model: AnomalibModule, items: int) -> None:
    network: Any = model.eval().model
    features = network.feature_extractor(torch.rand(1, 3, 64, 64))
    network.memory_bank = torch.rand(items, sum(layer.shape[1] for layer in features.values()))


def _fit_gaussians(model: AnomalibModule, image_size: int) -> None:
    network: Any = model.train().model
    network(torch.rand(2, 3, image_size, image_size))
    network.fit()


def _set_thresholds(model: AnomalibModule) -> None:
    """Give the post-processor of an untrained model the range [0, 1], and 0.5 as threshold."""
    for name, value in cast("PostProcessor", model.post_processor).named_buffers():
        if value.is_floating_point():
            value.fill_({"max": 1.0, "min": 0.0}.get(name[-3:], 0.5))
    model.eval()


def _gigaflops(model: AnomalibModule, size: int) -> float:
    """Multiplications and additions of the convolutions and matrix products, in 10^9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.rand(1, 3, size, size))
    return float(counter.get_total_flops()) / 1e9


def _matrix_rate(threads: int, size: int = 1024) -> float:
    matrix = torch.rand(size, size)
    timer = Timer("torch.mm(matrix, matrix)", globals={"torch": torch, "matrix": matrix}, num_threads=threads)
    return 2 * size**3 / min(timer.timeit(1).median for _ in range(5)) / 1e9


if __name__ == "__main__":
    auto_cli(inference_speed, as_positional=False)
