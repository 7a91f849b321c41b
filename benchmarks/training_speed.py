# SPDX-License-Identifier: Apache-2.0
"""Where a training step's time and memory go, for each of the package's models.

Run as ``python benchmarks/training_speed.py``.
"""

import math
import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.models import get_model
from anomalib.models.components import AnomalibModule
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

from anomalib_fractalad.benchmark.fit import peak_memory
from anomalib_fractalad.benchmark.surroundings import cpu_threads, quiet
from anomalib_fractalad.models import FractalAD
from anomalib_fractalad.models.fractalad.torch_model import cosine_similarity_attention
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training.loggers import LIGHTNING

WARM_UP = 2
SEED = 0


def training_speed(
    backbone: str = "resnet18",
    batch_size: int = 16,
    image_size: int = 256,
    steps: int = 10,
    device: str = "cpu",
    threads: int = 1,
    precision: str = "32-true",
    models: tuple[str, ...] = tuple(MODELS),
    memory: bool = True,
) -> dict[str, dict[str, float]]:
    """Print the median time of a training step, of its anomalies and, of FractalAD, of its unavoidable parts.

    The steps are Lightning's, and the parts are timed alone between them, in the same run. The unavoidable parts of
    FractalAD's step are two passes of the teacher, a pass of the student with gradient and one without, and the head,
    forward and backward.

    Args:
        backbone: Name of a timm model, with random weights.
        batch_size: Number of images in a batch.
        image_size: Height and width of the images in pixels.
        steps: Number of timed steps, after two that are not timed. AAND takes as many in each of its stages,
            FractalMemory one in its first and all others in its second. On a CPU AAND is timed once more with
            its features kept.
        device: Device to train on: cpu or cuda.
        threads: Number of CPU threads.
        precision: Precision of Lightning's trainer, such as 32-true or bf16-mixed.
        models: The models to time.
        memory: Compare FractalAD's peak memory with that of a step which keeps gradients everywhere, each in a process
            of its own.

    Returns:
        Median seconds, shares and ratios by model.
    """
    print(f"{backbone}, batches of {batch_size} images of {image_size} x {image_size}", end=", ")
    print(f"{device}, {threads} CPU thread(s), {precision}")
    results = {}
    for name in models:
        with quiet(*LIGHTNING), cpu_threads(threads):
            where = (name, backbone, batch_size, image_size, steps, device, precision)
            results[name] = _time_model(*where)
            if name == "AAND" and device == "cpu":
                kept = _time_model(*where, keep_features=True)["step of stage 2_s"]
                results[name]["step of stage 2, features kept_s"] = kept
                results[name]["step of stage 2 / with features kept"] = results[name]["step of stage 2_s"] / kept
        if memory and name == "FractalAD":
            results[name].update(_compare_memory(backbone, batch_size, image_size, device, threads, precision))
        for what, value in results[name].items():
            is_time = what.endswith("_s")
            shown = f"{1e3 * value:10.1f} ms" if is_time else f"{value:10.3g}"
            print(f"{name:13} {what.removesuffix('_s'):44} {shown}")
    return results


class PartTimer(Callback):
    """Times steps, the anomalies made in them, and, between the steps, parts of them alone."""

    def __init__(self, parts: Mapping[str, Callable[[], object]]) -> None:
        self.parts = parts
        self.threads = torch.get_num_threads()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.anomalies = 0.0

    def watch(self, module: Any, function: str) -> None:
        """Add up the time that a step spends in a function of the anomaly generator."""
        original = getattr(module, function)

        def timed(images: Tensor, *region: Tensor | None) -> Any:
            elapsed, result = _time(lambda: original(images, *region), images.device)
            self.anomalies += elapsed
            return result

        setattr(module, function, timed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Start the clock."""
        del trainer
        self.anomalies = 0.0
        stage = getattr(pl_module, "stage", None)
        self.step = "step" if stage is None else f"step of stage {int(stage)}"
        _synchronize(pl_module.device)
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stop the clock, and time the parts."""
        _synchronize(pl_module.device)
        elapsed = time.perf_counter() - self.start
        self.seconds[self.step].append(elapsed)
        if self.anomalies:
            self.seconds[f"anomalies in a {self.step}"].append(self.anomalies)
        for part, run in self.parts.items():
            with trainer.precision_plugin.forward_context():
                self.seconds[part].append(
                    Timer("run()", globals={"run": run}, num_threads=self.threads).timeit(1).median
                )
            pl_module.zero_grad()

    def medians(self) -> dict[str, float]:
        """Median seconds of everything timed, without the first steps."""
        return {name: statistics.median(times[WARM_UP:] or times) for name, times in self.seconds.items()}


def _time_model(
    name: str,
    backbone: str,
    batch_size: int,
    image_size: int,
    steps: int,
    device: str,
    precision: str,
    **arguments: Any,
) -> dict[str, float]:
    model, images = _make(name, backbone, batch_size, image_size, device, **arguments)
    timer = PartTimer(_parts(model, images) if isinstance(model, FractalAD) else {})
    if isinstance(model, FractalAD):
        timer.watch(model.generator, "augment")
    else:
        timer.watch(getattr(model.generator, "_generator", model.generator), "forward")
    stages = 2 if name in {"AAND", "FractalMemory"} else 1
    _fit(model, images, stages * (steps + WARM_UP), device, precision, timer)
    medians = timer.medians()
    results = {f"{what}_s": value for what, value in medians.items()}
    for what, value in medians.items():
        if what.startswith("anomalies in a "):
            step = what.removeprefix("anomalies in a ")
            results[f"anomalies' share of a {step}"] = value / medians[step]
    if isinstance(model, FractalAD):
        unavoidable = medians["teacher"] + sum(medians[part] for part in timer.parts)
        results["step / unavoidable parts"] = medians["step"] / unavoidable
    return results


def _make(
    name: str, backbone: str, batch_size: int, image_size: int, device: str, **arguments: Any
) -> tuple[Any, Tensor]:
    torch.manual_seed(SEED)
    both_stages = {"AAND": {"split": (1, 1)}, "FractalMemory": {"head": True}}
    extra = both_stages.get(name, {}) | arguments
    model: AnomalibModule = get_model(
        name,
        backbone=backbone,
        pre_trained=False,
        pre_processor=False,
        evaluator=False,
        visualizer=False,
        **extra,
    )
    return model.to(device), torch.rand(batch_size, 3, image_size, image_size, device=device)


def _fit(model: Any, images: Tensor, steps: int, device: str, precision: str, *callbacks: Callback) -> None:
    batch = ImageBatch(image=images, gt_label=torch.zeros(len(images), dtype=torch.bool))
    trainer = Trainer(
        accelerator="gpu" if device == "cuda" else device,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=steps,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with quiet(*LIGHTNING):
        # One batch an epoch, so that AAND's stages get as many steps each.
        trainer.fit(model, DataLoader(cast("Any", [batch]), batch_size=None))


def _parts(model: FractalAD, images: Tensor) -> dict[str, Callable[[], object]]:
    network: Any = model.model
    student = network.student
    masks = torch.zeros_like(images[:, :1])
    features = network.teacher(images)

    def without_gradient() -> None:
        with torch.no_grad():
            student(images)

    def head() -> None:
        losses = model.segmentation_loss(network.head(features, images.shape[-2:]), masks)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]

    return {
        "teacher": lambda: network.teacher(images),
        "student with gradient": lambda: _backward(student(images)),
        "student without gradient": without_gradient,
        "head, forward and backward": head,
    }


def _backward(features: list[Tensor]) -> None:
    torch.stack([feature.float().mean() for feature in features]).sum().backward()  # type: ignore[no-untyped-call]


def _compare_memory(backbone: str, batch_size: int, image_size: int, *where: Any) -> dict[str, float]:
    """Peak memory of a step beyond what model and images take, as it is and with gradients kept everywhere."""
    context = multiprocessing.get_context("spawn")
    peaks = []
    for keep in (False, True):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_peak_memory, (keep, backbone, batch_size, image_size, *where)))
    return {
        "peak memory of a step, MiB": peaks[0],
        "with gradients kept everywhere, MiB": peaks[1],
        "memory / memory with gradients everywhere": peaks[0] / peaks[1] if peaks[1] else math.nan,
    }


def _peak_memory(
    keep: bool, backbone: str, batch_size: int, image_size: int, device: str, threads: int, precision: str
) -> float:
    with cpu_threads(threads):
        model, images = _make("FractalAD", backbone, batch_size, image_size, device)
        if keep:
            _keep_gradients(model)
        if device == "cuda":
            allocated = torch.cuda.memory_allocated()
            _fit(model, images, WARM_UP, device, precision)
            return (torch.cuda.max_memory_allocated() - allocated) / 2**20
        before = peak_memory() or math.nan
        _fit(model, images, WARM_UP, device, precision)
        return (peak_memory() or math.nan) - before


def _keep_gradients(model: FractalAD) -> None:
    """Let every pass keep what a backward pass would need, as if nothing were frozen."""
    network: Any = model.model
    network.teacher.requires_grad_(requires_grad=True)

    def segment(images: Tensor) -> Tensor:
        features = list(map(cosine_similarity_attention, network.teacher(images), network.student(images)))
        logits: Tensor = network.head(features, images.shape[-2:])
        return logits

    network.segment = segment


def _time(run: Callable[[], object], device: torch.device) -> tuple[float, Any]:
    _synchronize(device)
    start = time.perf_counter()
    result = run()
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    auto_cli(training_speed, as_positional=False)
