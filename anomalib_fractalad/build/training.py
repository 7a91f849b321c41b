# SPDX-License-Identifier: Apache-2.0
"""Training one candidate with anomalib's engine, or going on where it was stopped."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

from anomalib_fractalad.training.checkpoint_io import AtomicCheckpointIO
from anomalib_fractalad.training.epoch_checkpoint import every_epoch

from .candidates import Candidate

_STEPS_PER_EPOCH = 50  # at most; a large folder is not gone through as a whole before anything is saved
_FEWEST_EPOCHS = 2  # AAND's stages take one each

Show = Callable[[str, float | None], None]


def trainer_length(candidate: Candidate, images: int, share: float = 1.0) -> dict[str, Any]:
    """How long a candidate trains, as arguments of Lightning's trainer.

    Args:
        candidate: The candidate.
        images: Number of images to train on.
        share: Share of its whole training.
    """
    if candidate.steps is None:
        return {"max_epochs": 1}
    batches = math.ceil(images / candidate.batch_size)
    steps = min(batches, _STEPS_PER_EPOCH)
    epochs = max(_FEWEST_EPOCHS, math.ceil(share * candidate.steps / steps))
    return {"max_epochs": epochs, **({} if steps == batches else {"limit_train_batches": steps})}


def train(
    model: AnomalibModule,
    data: AnomalibDataModule,
    length: dict[str, Any],
    folder: Path,
    *,
    accelerator: str = "auto",
    validate: bool = False,
    show: Show = lambda _text, _left: None,
) -> Engine:
    """Train a model; a training that was stopped goes on after its last epoch.

    Args:
        model: The model, made right after random numbers were seeded.
        data: Its data.
        length: Length of the training, see :func:`trainer_length`.
        folder: Where its checkpoint lies, ``training.ckpt``.
        accelerator: Where it trains.
        validate: Validate once in the end, for the thresholds.
        show: Called with how far it is, and the seconds left.

    Returns:
        The engine.
    """
    checkpoint = folder / "training.ckpt"
    validation = {"check_val_every_n_epoch": length["max_epochs"]} if validate else {"limit_val_batches": 0}
    engine = Engine(
        callbacks=[_Shown(show), every_epoch(checkpoint)],
        plugins=[AtomicCheckpointIO()],
        accelerator=accelerator,
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **length,
        **validation,
    )
    engine.fit(model, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    return engine


class _Shown(Callback):
    """Tells how far a training is."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._begin = 0.0
        self._done_before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the time, and what was done before."""
        del pl_module
        self._begin, self._done_before = time.monotonic(), _done(trainer, -1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the step."""
        del pl_module, outputs, batch
        done = _done(trainer, batch_idx)
        left = None
        if done > self._done_before:
            left = (time.monotonic() - self._begin) * (1 - done) / (done - self._done_before)
        steps = (trainer.max_epochs or 1) * trainer.num_training_batches
        self._show(f"step {round(done * steps)} of {steps:.0f}", left)


def _done(trainer: Trainer, batch_idx: int) -> float:
    batches = trainer.num_training_batches or 1
    return min(1.0, (trainer.current_epoch + (batch_idx + 1) / batches) / (trainer.max_epochs or 1))


class _Stopwatch(Callback):
    """Measures the seconds from one step's end to the next, once in each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the time."""
        del trainer, pl_module, outputs, batch
        now = time.monotonic()
        if batch_idx and self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def seconds_per_step(model: AnomalibModule, data: AnomalibDataModule, folder: Path, accelerator: str = "auto") -> float:
    """Train a model for four steps to see that it does, and how long a step takes.

    Args:
        model: The model; it is of no use afterwards.
        data: Its data.
        folder: Where its files lie.
        accelerator: Where it trains.
    """
    watch = _Stopwatch()
    engine = Engine(
        callbacks=[watch, ModelCheckpoint(dirpath=folder, save_top_k=0)],
        accelerator=accelerator,
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        limit_train_batches=2,
        limit_val_batches=0,
        max_epochs=2,
    )
    engine.fit(model, datamodule=data)
    return sum(watch.seconds) / len(watch.seconds) if watch.seconds else 0.0


@torch.inference_mode()
def seconds_per_image(model: AnomalibModule, image_size: tuple[int, int]) -> float:
    """Time that an image takes on the CPU in a model's network.

    Args:
        model: The model.
        image_size: Height and width of its images.
    """
    images = torch.zeros(4, 3, *image_size)
    model.eval()
    begin = time.monotonic()
    model.model(images)
    return (time.monotonic() - begin) / len(images)
