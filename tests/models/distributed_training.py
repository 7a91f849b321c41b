# SPDX-License-Identifier: Apache-2.0
"""Trains every model in two processes; run by test_distributed.py, and by Lightning once more for the second process.

python distributed_training.py DATA RESULTS
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from anomalib.engine import Engine
from conftest import make_tiles
from lightning import Callback, LightningModule, Trainer, seed_everything
from test_all_models import small_model
from test_cli import SMALL, cli, data_arguments

from anomalib_fractalad.registration import MODELS

BY_PROGRAM = ("ADPS", "FractalMemory")  # which each have a case of their own there


class Notes(Callback):
    """Notes what each process sees and comes to."""

    def __init__(self) -> None:
        self.random: list[str] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.random.append(digest([torch.get_rng_state()]))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.rank, self.weights = trainer.global_rank, digest(module.model.state_dict().values())


def digest(tensors: Any) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def main(data: Path, results: Path) -> None:
    for name in MODELS:
        seed_everything(0, workers=True)
        notes, model = Notes(), small_model(name)
        engine = Engine(
            default_root_dir=results / name,
            max_epochs=2,
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            callbacks=[notes],
            enable_progress_bar=False,
        )
        engine.fit(model, datamodule=make_tiles(data))
        (metrics,) = engine.test(model, datamodule=make_tiles(data))
        told = {"random": notes.random, "weights": notes.weights, "metrics": metrics}
        (results / f"{name}_{notes.rank}.json").write_text(json.dumps(told))
        if name not in BY_PROGRAM:
            continue
        extra = ("--model.patches", "2") if name == "ADPS" else ()
        program = cli(
            *("train", "--model", name, *SMALL, *extra, *data_arguments(data)),
            *("--default_root_dir", results / "program", "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu"),
            *("--trainer.strategy", "ddp", "--trainer.devices", 2),
        )
        trainer = program.engine.trainer
        metrics = {metric: value.item() for metric, value in trainer.callback_metrics.items()}
        told = {"processes": trainer.world_size, "metrics": metrics}
        (results / f"program_{name}_{trainer.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(Path, sys.argv[1:]))
