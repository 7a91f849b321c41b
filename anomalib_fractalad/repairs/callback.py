# SPDX-License-Identifier: Apache-2.0
"""Repairs for as long as a model of this package runs in Lightning."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from .data import repair, restore

_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


class RepairedData(Callback):
    """Has the data sets of a run read in the repaired way, and leaves them as they were."""

    def __init__(self) -> None:
        super().__init__()
        self._changed: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Repair the data sets of the data module and of loaders that were passed."""
        del pl_module, stage
        datamodule = getattr(trainer, "datamodule", None)
        names = ("train_data", "val_data", "test_data")
        datasets = [getattr(datamodule, name) for name in names if hasattr(datamodule, name)]
        self._changed += repair([*datasets, *_passed_datasets(trainer)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the data sets as they were."""
        del trainer, pl_module, stage
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the data sets as they were, also where a run ends with an error."""
        del trainer, pl_module, exception
        self._restore()

    def _restore(self) -> None:
        restore(self._changed)
        self._changed = []


def _passed_datasets(trainer: Trainer) -> list[Any]:
    """Data sets of loaders that were passed to the trainer, as far as Lightning lets them be seen."""
    loops = [getattr(trainer, name, None) for name in _LOOPS]
    loops.append(getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None))
    loops.append(getattr(loops[-1], "val_loop", None))
    sources = [getattr(getattr(loop, "_data_source", None), "instance", None) for loop in loops]
    return [loader.dataset for loader in CombinedLoader(sources).flattened if hasattr(loader, "dataset")]
