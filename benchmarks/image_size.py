# SPDX-License-Identifier: Apache-2.0
"""Peak memory of training and inference by image size.

Run as ``python benchmarks/image_size.py``.
"""

import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.models import get_model
from jsonargparse import auto_cli
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from anomalib_fractalad.benchmark.exports import FLOAT32
from anomalib_fractalad.benchmark.fit import peak_memory
from anomalib_fractalad.benchmark.surroundings import cpu_threads, quiet
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.registration import MODELS

TILE = 256


def image_size(
    sizes: tuple[int, ...] = (256, 512, 1024, 2048),
    models: tuple[str, ...] = tuple(MODELS),
    tasks: tuple[str, ...] = ("train 1", "train 4", "train 1 tiles", "torch", "torch tiles", "openvino"),
    backbone: str = "resnet18",
) -> None:
    """Print a Markdown table of peak resident memory in GB, Python and all packages included.

    Each figure comes from a process of its own, with one CPU thread.

    Args:
        sizes: Height and width of the images in pixels.
        models: Names of the package's models.
        tasks: What to measure: ``train`` and a batch size, or ``torch`` or ``openvino``, which predict one image; with
            ``tiles`` behind it, through anomalib's tiler with tiles of 256x256.
        backbone: Name of a timm model, with random weights.
    """
    print("| model | task | " + " | ".join(map(str, sizes)) + " |")
    print("| --- | --- |" + " ---: |" * len(sizes))
    for name in models:
        for task in tasks:
            peaks = " | ".join(f"{_peak_of(name, task, size, backbone):.1f}" for size in sizes)
            print(f"| {name} | {task} | {peaks} |", flush=True)


def _peak_of(name: str, task: str, size: int, backbone: str) -> float:
    with TemporaryDirectory() as folder:
        arguments = (name, task, size, backbone, Path(folder))
        if not task.startswith("openvino"):
            return _in_a_process(_train_or_predict, arguments)
        _in_a_process(_export, arguments)  # takes more memory than predicting
        return _in_a_process(_predict_with_openvino, arguments)


def _in_a_process(function: Callable[..., float], arguments: tuple[Any, ...]) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_on_one_thread, (function, arguments))


def _on_one_thread(function: Callable[..., float], arguments: tuple[Any, ...]) -> float:
    with quiet(), cpu_threads(1):
        return function(*arguments)


def _model(name: str, task: str, size: int, backbone: str) -> OneClassModule:
    pre_processor = OneClassModule.configure_pre_processor((size, size))
    model: Any = get_model(name, backbone=backbone, pre_trained=False, pre_processor=pre_processor, visualizer=False)
    model.model.tiler = Tiler(TILE, TILE) if task.endswith("tiles") else None
    return model  # type: ignore[no-any-return]


def _train_or_predict(name: str, task: str, size: int, backbone: str, folder: Path) -> float:
    model = _model(name, task, size, backbone)
    if not task.startswith("train"):
        with torch.inference_mode():
            model.eval()(torch.rand(1, 3, size, size))
        return _peak()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,  # one for each stage of AAND
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **model.trainer_arguments,
    )
    batch = ImageBatch(image=torch.rand(int(task.split()[1]), 3, size, size))
    trainer.fit(model, DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
    return _peak()


def _export(name: str, task: str, size: int, backbone: str, folder: Path) -> float:
    _model(name, task, size, backbone).to_openvino(folder, input_size=(size, size))
    return _peak()


def _predict_with_openvino(name: str, task: str, size: int, backbone: str, folder: Path) -> float:
    del name, task, backbone
    from openvino import Core  # noqa: PLC0415  an extra

    settings = {**FLOAT32, "INFERENCE_NUM_THREADS": 1}
    network = Core().compile_model(folder / "weights/openvino/model.xml", "CPU", settings)
    network(torch.rand(1, 3, size, size).numpy())
    return _peak()


def _peak() -> float:
    peak = peak_memory()
    if peak is None:
        msg = f"peak memory cannot be told on {sys.platform}"
        raise NotImplementedError(msg)
    return peak * 2**20 / 1e9


if __name__ == "__main__":
    auto_cli(image_size, as_positional=False)
