# SPDX-License-Identifier: Apache-2.0
"""Trains models in processes that are killed, and resumes them."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.callbacks import ModelCheckpoint
from conftest import make_tiles, small_engine, small_model
from lightning import Callback, seed_everything

EPOCHS = 3  # of 3 steps


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillInStep(Callback):
    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4:
            kill()


class KillInValidation(Callback):
    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            kill()


class KillInWriting(Callback):
    """Kills when half of the second checkpoint is on the disk."""

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            os.fsync = self.cut_off

    @staticmethod
    def cut_off(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size // 2)
        kill()


POINTS: dict[str, type[Callback]] = {"step": KillInStep, "validation": KillInValidation, "writing": KillInWriting}
# Each model in steps with workers, or without; each other point with two models.
CASES = [
    ("FractalAD", "step", 2),
    ("FractalAD", "writing", 0),
    ("ADPS", "step", 0),
    ("ADPS", "validation", 0),
    ("AAND", "step", 2),
    ("AAND", "validation", 0),
    ("FractalMemory", "step", 0),
    ("FractalMemory", "writing", 0),
]


def train(
    name: str, workers: int, data: Path, folder: Path, *callbacks: Callback, every_step: int = 0, validation: int = 1
) -> None:
    """Train from the last checkpoint in a folder, and write the weights into the folder.

    Args:
        name: Name of the model.
        workers: Worker processes of the data loader.
        data: The data set.
        folder: Where checkpoints are.
        *callbacks: Further callbacks.
        every_step: Number of steps between checkpoints; 0 for anomalib's own, one file at the end of every epoch.
        validation: Number of epochs between validations.
    """
    checkpoints = sorted(folder.glob("*.ckpt"), key=os.path.getmtime)
    seed_everything(99 if checkpoints else 1)
    model, datamodule = small_model(name), make_tiles(data, num_workers=workers)
    datamodule.train_batch_size = 3
    steps = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": every_step} if every_step else {}
    checkpoint = ModelCheckpoint(folder, **{"filename": "model", **steps})
    engine = small_engine(
        folder, max_epochs=EPOCHS, check_val_every_n_epoch=validation, callbacks=[checkpoint, *callbacks]
    )
    engine.fit(model, datamodule=datamodule, ckpt_path=checkpoints[-1] if checkpoints else None)
    torch.save(model.state_dict(), folder / "weights.pt")


def in_a_process(function: Callable[..., None], *arguments: Any, **options: Any) -> int:
    """Run a function in a fork of this process, which has imported everything; gives its exit code or -signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments, **options)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
