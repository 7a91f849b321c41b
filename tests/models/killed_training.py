# SPDX-License-Identifier: Apache-2.0
"""Trains models in processes that are killed, and resumes them."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    """Run a function in a process of its own, and give its exit code or -signal.

    It is forked off a server that has imported everything and computed nothing: a fork of this process, whose threads
    do not go with it, would crash at times.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_training"])
    process = context.Process(target=_run, args=(function, arguments, options))
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # else the server finds nothing to import
        process.start()
    process.join(1000)
    assert process.exitcode is not None, "the process has not ended in 1000 s"
    return process.exitcode


def _run(function: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # which a loader's workers start by, as anywhere else
    function(*arguments, **options)
