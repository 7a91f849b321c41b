# SPDX-License-Identifier: Apache-2.0
"""Trains models in processes that are killed, and resumes them; run by test_resume.py.

python killed_training.py DATA RESULTS
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.callbacks import ModelCheckpoint
from conftest import make_tiles, small_engine
from lightning import Callback, seed_everything
from test_all_models import small_model

from anomalib_fractalad.registration import MODELS

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
CASES = [*((point, 0) for point in POINTS), ("step", 2)]  # with 0 or 2 workers


def train(name: str, workers: int, data: Path, folder: Path, *callbacks: Callback) -> None:
    """Train from the last checkpoint in a folder, and write the weights into the folder."""
    checkpoints = sorted(folder.glob("*.ckpt"), key=os.path.getmtime)
    seed_everything(99 if checkpoints else 1)
    model, datamodule = small_model(name), make_tiles(data, num_workers=workers)
    datamodule.train_batch_size = 3
    # A checkpoint every second step, thus within epochs, or anomalib's own: one file at the end of every epoch.
    steps = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2} if folder.name == "step" else {}
    checkpoint = ModelCheckpoint(folder, **{"filename": "model", **steps})
    engine = small_engine(folder, max_epochs=EPOCHS, callbacks=[checkpoint, *callbacks])
    engine.fit(model, datamodule=datamodule, ckpt_path=checkpoints[-1] if checkpoints else None)
    torch.save(model.state_dict(), folder / "weights.pt")


def in_a_process(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a fork of this process, which has imported everything; gives its exit code or -signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(data: Path, results: Path) -> None:
    for name in MODELS:
        assert in_a_process(train, name, 0, data, results / name / "unbroken") == 0
        for point, workers in CASES:
            folder = results / name / str(workers) / point
            assert in_a_process(train, name, workers, data, folder, POINTS[point]()) == -signal.SIGKILL
            assert list(folder.glob("*.ckpt"))
            assert not (folder / "weights.pt").exists()
            assert in_a_process(train, name, workers, data, folder) == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
