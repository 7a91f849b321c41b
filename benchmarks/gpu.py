# SPDX-License-Identifier: Apache-2.0
"""What a GPU gives: anomalies, training steps, inference, and two trainings, as gpu.json and gpu.md.

Run as ``python benchmarks/gpu.py``, or by ``benchmarks/gpu.sh``, which installs what it needs and runs the tests too.
"""

import json
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import anomalib.models
import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from generator_speed import generator_speed
from inference_speed import NOISE, make_model
from jsonargparse import auto_cli
from torch.utils.benchmark import Timer
from training_speed import training_speed

from anomalib_fractalad.benchmark.surroundings import quiet
from anomalib_fractalad.data import SurfaceDefects
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training.loggers import LIGHTNING

Figures = dict[str, float]
MEMORY_ITEMS = 10_000  # of PatchCore


def gpu(
    output: Path = Path("results/gpu"),
    device: str = "cuda",
    root: Path | None = None,
    backbone: str = "tf_efficientnet_lite0",
    pre_trained: bool = True,
    image_size: int = 256,
    batch_size: int = 32,
    generator_batch_size: int = 512,
    repetitions: int = 10,
    epochs: int = 9,
    draem_steps: int = 500,
) -> None:
    """Measure all parts in turn, and write what there is after each; a part that fails leaves its error.

    Args:
        output: Folder of gpu.json and gpu.md.
        device: Device: cuda or cpu.
        root: Folder with the category grid of MVTec AD. Left out, the metal plate of SurfaceDefects takes its place.
        backbone: Name of a timm model, for the package's models.
        pre_trained: Whether the two trainings start from ImageNet weights.
        image_size: Height and width of the images in pixels.
        batch_size: Number of images in a batch of training and of inference.
        generator_batch_size: Number of images in a batch of anomalies. A GPU takes as long for 16 images as for 256:
            the time is that of starting its work.
        repetitions: Number of timed batches and steps.
        epochs: Length of FractalMemory's training, with a head.
        draem_steps: Length of DRAEM's training.
    """
    output.mkdir(parents=True, exist_ok=True)
    precision = "bf16-mixed"
    parts: dict[str, Callable[[], Figures]] = {
        "Anomalies, images per second": lambda: generator_speed(
            generator_batch_size, image_size, min(repetitions, 3), device, torch.get_num_threads()
        ),
        f"Training steps, {precision}": lambda: _training(
            backbone, batch_size, image_size, repetitions, device, precision
        ),
        "Inference in torch": lambda: _inference(backbone, batch_size, image_size, repetitions, device),
        f"FractalMemory with a head, {epochs} epochs": lambda: _train(
            "FractalMemory",
            {"backbone": backbone, "pre_trained": pre_trained, "head": True},
            {"max_epochs": epochs},
            root,
            image_size,
            device,
        ),
        f"DRAEM, {draem_steps} steps": lambda: _train(
            "Draem", NOISE, {"max_steps": draem_steps, "max_epochs": -1}, root, image_size, device
        ),
    }
    settings = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "backbone": backbone,
        "images": f"{image_size}x{image_size}",
        "batch": batch_size,
        "data": "grid of MVTec AD" if root else "metal plate of SurfaceDefects",
    }
    results: dict[str, Figures | str] = {}
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = {**part(), "seconds of this part": time.perf_counter() - start}
        except Exception as error:  # what a rented hour has measured so far is kept
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
        _write(output, settings, results)


def _training(backbone: str, batch_size: int, image_size: int, steps: int, device: str, precision: str) -> Figures:
    found = training_speed(
        backbone, batch_size, image_size, steps, device, torch.get_num_threads(), precision, memory=device == "cuda"
    )
    return {f"{model}: {what}": value for model, figures in found.items() for what, value in figures.items()}


def _inference(backbone: str, batch_size: int, image_size: int, repetitions: int, device: str) -> Figures:
    """Milliseconds of one image, and images per second in batches, with pre- and post-processing."""
    figures = {}
    for name in (*MODELS, "Patchcore", "Draem"):
        model = make_model(name, backbone, image_size, {}, MEMORY_ITEMS).to(device)
        for count in (1, batch_size):
            images = torch.rand(count, 3, image_size, image_size, device=device)
            with torch.inference_mode():
                timer = Timer("model(images)", globals={"model": model, "images": images})
                timer.timeit(2)
                seconds = statistics.median(timer.timeit(1).median for _ in range(repetitions))
            if count == 1:
                figures[f"{name}: ms for one image"] = 1e3 * seconds
            else:
                figures[f"{name}: images per second in batches of {count}"] = count / seconds
    return figures


def _train(
    name: str, arguments: Mapping[str, Any], length: Mapping[str, Any], root: Path | None, size: int, device: str
) -> Figures:
    torch.manual_seed(0)
    data: dict[str, Any] = {"train_batch_size": 16, "eval_batch_size": 32}
    datamodule = cast(
        "AnomalibDataModule",
        MVTecAD(root, category="grid", **data) if root else SurfaceDefects(category="metal_plate", **data),
    )
    kind: Any = getattr(anomalib.models, name)
    model: AnomalibModule = kind(
        **arguments, pre_processor=kind.configure_pre_processor((size, size)), visualizer=False
    )
    engine = Engine(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        logger=False,
        enable_model_summary=False,
        default_root_dir=Path("results") / "gpu" / name,
        enable_progress_bar=False,
        **length,
    )
    start = time.perf_counter()
    with quiet(*LIGHTNING):
        engine.fit(model, datamodule=datamodule)
    seconds = time.perf_counter() - start
    (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    return {"fit, seconds": seconds, **metrics}


def _write(output: Path, settings: Mapping[str, Any], results: Mapping[str, Figures | str]) -> None:
    (output / "gpu.json").write_text(json.dumps({"settings": settings, "results": results}, indent=1), encoding="utf-8")
    lines = ["# On a GPU", "", ", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    for part, figures in results.items():
        lines += [f"## {part}", ""]
        if isinstance(figures, str):
            lines += [figures, ""]
            continue
        lines += ["| | |", "| --- | --- |", *(f"| {name} | {_short(value)} |" for name, value in figures.items()), ""]
    (output / "gpu.md").write_text("\n".join(lines), encoding="utf-8")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


if __name__ == "__main__":
    auto_cli(gpu, as_positional=False)
