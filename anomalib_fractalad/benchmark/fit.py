# SPDX-License-Identifier: Apache-2.0
"""Training of one model: its time, its cost, how far it is, and how it goes on after it was stopped."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_fractalad.benchmark.config import import_class, parse_entry
from anomalib_fractalad.training.checkpoint_io import AtomicCheckpointIO
from anomalib_fractalad.training.epoch_checkpoint import every_epoch

_SHOW_SECONDS = 1.0

Progress = dict[str, Any]


class CannotResumeError(RuntimeError):
    """A training could not be taken up from its checkpoint."""


def environment() -> dict[str, Any]:
    """The machine: what the figures depend on and the description of a job does not hold."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"platform": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count(), "cuda": cuda}


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def build(spec: dict[str, Any], root: Path) -> tuple[AnomalibModule, AnomalibDataModule]:
    """Build model and data module from a job's description.

    Images are divided before there is a model, whose weights take random numbers: each model has the same images.

    Args:
        spec: The job's description.
        root: An empty folder.

    Returns:
        The model, without its visualizer, and the data module, set up.
    """
    arguments = {**spec["model"]["init_args"]}
    if "dtd_dir" in arguments and arguments["dtd_dir"] is None:
        arguments["dtd_dir"] = str(root)  # a folder without images: noise instead of a download
    if spec["image_size"] is not None and arguments.get("pre_processor") is True:
        model_class = import_class(spec["model"]["class_path"])
        arguments["pre_processor"] = model_class.configure_pre_processor(image_size=tuple(spec["image_size"]))
    seed_everything(spec["seed"], workers=True)
    datamodule = _instantiate(AnomalibDataModule, spec["data"])
    datamodule.prepare_data()
    datamodule.setup(TrainerFn.FITTING)
    if spec["train_batch_size"] is not None:
        datamodule.train_batch_size = spec["train_batch_size"]
    seed_everything(spec["seed"], workers=True)
    model = _instantiate(AnomalibModule, {"class_path": spec["model"]["class_path"], "init_args": arguments})
    model.visualizer = None
    return model, datamodule


def _instantiate(base: type, entry: dict[str, Any]) -> Any:
    parser, config = parse_entry(base, {name: entry[name] for name in ("class_path", "init_args")})
    return parser.instantiate_classes(config).entry


def inputs(spec: dict[str, Any], datamodule: AnomalibDataModule) -> Iterator[Path]:
    """Folders of all images and masks, and files among the model's arguments.

    Args:
        spec: The job's description.
        datamodule: Its data, set up.
    """
    for name in ("train_data", "val_data", "test_data"):
        samples = getattr(datamodule, name).samples if hasattr(datamodule, name) else {}
        for column in ("image_path", "mask_path"):
            yield from {Path(path).parent for path in samples.get(column, []) if isinstance(path, str) and path}
    for value in spec["model"]["init_args"].values():
        if isinstance(value, str) and Path(value).is_file():
            yield Path(value)


class FitMeter(Callback):
    """Measures training, and shows how far it is. Checkpoints hold what it measured, so that figures add up.

    Args:
        show: Called with ``epoch`` and ``epochs``, ``step`` and ``steps``, ``loss``, ``seconds_left`` about once a
            second; what is not known is ``None``.

    Attributes:
        images: Number of images that the model was trained on.
        is_running: Whether a training step was done in this process.
        resumed: Epochs and seconds that an earlier call brought, if one did.
    """

    def __init__(self, show: Callable[[Progress], object]) -> None:
        self.images = 0
        self.is_running = False
        self.resumed: dict[str, float] | None = None
        self._show = show
        self._epochs = 0
        self._seconds_before = self._seconds = 0.0
        self._peak_before: float | None = None
        self._start = self._shown = time.perf_counter()
        self._share_at_start = 0.0
        self._outputs: Any = None

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resumption included."""
        return self._seconds_before + self._seconds

    @property
    def peak_memory_mb(self) -> float | None:
        """Peak memory of all processes that trained, see :func:`peak_memory`."""
        peaks = [peak for peak in (self._peak_before, peak_memory()) if peak is not None]
        return max(peaks, default=None)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for a checkpoint."""
        self._seconds = time.perf_counter() - self._start
        return {
            "epochs": self._epochs,
            "seconds": self.seconds,
            "images": self.images,
            "peak_memory_mb": self.peak_memory_mb,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        self._seconds_before, self._peak_before = state_dict["seconds"], state_dict["peak_memory_mb"]
        self.images, self._epochs = state_dict["images"], state_dict["epochs"]
        self.resumed = {"epochs": self._epochs, "seconds": self._seconds_before}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        del trainer, pl_module
        self._start = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show where training begins."""
        del pl_module
        self._share_at_start = self._share(trainer, -1) or 0.0
        self._show(self._progress(trainer, None, -1))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the images, and show the loss."""
        del pl_module
        self.images += len(batch.image)
        self.is_running, self._outputs = True, outputs
        now = time.perf_counter()
        if now - self._shown >= _SHOW_SECONDS:
            self._shown = now
            self._show(self._progress(trainer, outputs, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the epochs, and show the last one's loss."""
        del pl_module
        self._epochs = trainer.current_epoch + 1
        self._show(self._progress(trainer, self._outputs, trainer.fit_loop.batch_idx))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        del trainer, pl_module
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds = time.perf_counter() - self._start

    def _progress(self, trainer: Trainer, outputs: Any, batch_idx: int) -> Progress:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        share, left = self._share(trainer, batch_idx), None
        if share is not None and share > self._share_at_start:
            elapsed = time.perf_counter() - self._start
            left = elapsed * (1 - share) / (share - self._share_at_start)
        return {
            "epoch": trainer.current_epoch + 1,
            "epochs": trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None,
            "step": trainer.global_step,
            "steps": trainer.max_steps if trainer.max_steps > 0 else None,
            "loss": float(loss) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None,
            "seconds_left": left,
        }

    @staticmethod
    def _share(trainer: Trainer, batch_idx: int) -> float | None:
        """Share of the training that is done, as far as it can be told."""
        if trainer.max_steps > 0:
            return min(1.0, trainer.global_step / trainer.max_steps)
        batches = trainer.num_training_batches
        if not trainer.max_epochs or trainer.max_epochs < 0 or batches in {0, float("inf")}:
            return None
        return min(1.0, (trainer.current_epoch + (batch_idx + 1) / batches) / trainer.max_epochs)


def fit(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    spec: dict[str, Any],
    root: Path,
    checkpoint: Path,
    meter: FitMeter,
) -> dict[str, Any]:
    """Train a model within its budget, without validation, or go on where its training was stopped.

    Each epoch leaves a checkpoint, written as a whole or not at all.

    Args:
        model: The model.
        datamodule: Its data.
        spec: The job's description.
        root: Folder for Lightning's files.
        checkpoint: The last epoch's checkpoint, with the optimizer; training goes on from it if it is there.
        meter: Measures the training.

    Returns:
        The cost of training.

    Raises:
        CannotResumeError: If the checkpoint cannot be used.
    """
    resumes = checkpoint.exists()
    engine = Engine(
        callbacks=[meter, every_epoch(checkpoint)],
        plugins=[AtomicCheckpointIO()],
        accelerator=spec["accelerator"],
        devices=1,
        default_root_dir=root,
        limit_val_batches=0,
        precision=spec["precision"],
        enable_model_summary=False,
        enable_progress_bar=False,
        **_length(spec),
    )
    try:
        engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint if resumes else None)
    except Exception as error:
        if resumes and not meter.is_running:
            msg = f"training cannot go on from {checkpoint}: {error}"
            raise CannotResumeError(msg) from error
        raise
    return _cost(model, engine.trainer, meter)


def _length(spec: dict[str, Any]) -> dict[str, Any]:
    if spec["epochs"] is not None:
        return {"max_epochs": spec["epochs"]}
    return {} if spec["steps"] is None else {"max_epochs": -1, "max_steps": spec["steps"]}


def _cost(model: AnomalibModule, trainer: Trainer, meter: FitMeter) -> dict[str, Any]:
    trained = {id(p): p.numel() for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    cost: dict[str, Any] = {
        "trainable_parameters": sum(trained.values()),
        "total_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_mb": meter.peak_memory_mb,
    }
    if trainer.strategy.root_device.type == "cuda":
        cost["peak_cuda_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    if meter.images:
        cost |= {"fit_seconds": meter.seconds, "train_images_per_second": meter.images / meter.seconds}
    return cost


def peak_memory() -> float | None:
    """Largest resident set of this process so far in MiB, without its data loaders' workers; none on Windows."""
    if sys.platform == "win32":
        return None
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage counts in the process that started this one
        (peak,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    import resource  # noqa: PLC0415

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
