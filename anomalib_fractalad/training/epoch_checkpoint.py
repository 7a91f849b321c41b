# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of every epoch, so that a training that dies loses no more than one."""

import logging
from pathlib import Path
from typing import Any

from anomalib.callbacks import ModelCheckpoint as AnomalibCheckpoint
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint

from .checkpoint_io import UNSYNCED, AtomicCheckpointIO

logger = logging.getLogger(__name__)

FILE_NAME = "last_epoch"


class EpochCheckpoint(Checkpoint):
    """Writes ``last_epoch.ckpt`` at the end of each training epoch, beside the trainer's own checkpoints.

    anomalib writes its checkpoint after a validation, which may come only at the end of a training. Epochs after which
    a checkpoint that can be resumed from is written anyway are left out. The file goes at the end of a training that
    wrote a checkpoint of its last step. Where the trainer writes no checkpoints, this writes none either.
    """

    def __init__(self) -> None:
        self._path: str | None = None
        self._step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start without a file."""
        del trainer, pl_module, stage
        self._path, self._step = None, -1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        del pl_module
        writers = _writers(trainer)
        trial = getattr(trainer, "fast_dev_run", False)
        if not writers or trial or any(step == trainer.global_step for step, _ in _saved(writers)):
            return
        if self._path is None:
            self._path = _free_path(trainer, writers[0])
        quick = type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
        trainer.save_checkpoint(self._path, weights_only=False, storage_options=UNSYNCED if quick else None)
        self._step = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the file if another checkpoint is as new, or say where to go on from."""
        del pl_module, stage
        # As the trainer's checkpoint callback, it would be asked for the best model.
        others = [callback for callback in _callbacks(trainer) if callback is not self]
        trainer.callbacks = others  # type: ignore[attr-defined]
        if self._path is None:
            return
        if any(step >= self._step and Path(path).exists() for step, path in _saved(_writers(trainer))):
            if str(trainer.ckpt_path) != self._path:  # anomalib's Engine.train tests the file that it went on from
                trainer.strategy.remove_checkpoint(self._path)
            self._path = None
        elif trainer.is_global_zero:
            self._tell(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say where to go on from."""
        del pl_module, exception
        if trainer.is_global_zero and trainer.state.fn == "fit":
            self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        files = _saved(_writers(trainer))
        if self._path is not None:
            files.append((self._step, self._path))
        if files:
            step, path = max(files)
            logger.warning(
                "Training ended in epoch %d. ckpt_path=%s goes on from step %d.", trainer.current_epoch, path, step
            )

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def every_epoch(checkpoint: Path) -> ModelCheckpoint:
    """A callback for trainers that are to write one checkpoint at the end of each epoch, always the same file.

    Args:
        checkpoint: The file.
    """
    return AnomalibCheckpoint(
        dirpath=checkpoint.parent,
        filename=checkpoint.stem,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _writers(trainer: Trainer) -> list[ModelCheckpoint]:
    """The trainer's callbacks that write checkpoints."""
    found = [callback for callback in _callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.save_top_k != 0 or callback.save_last]


def _saved(writers: list[ModelCheckpoint]) -> list[tuple[int, str]]:
    """Step and path of each callback's last checkpoint that can be resumed from."""
    return [
        (writer._last_global_step_saved, writer._last_checkpoint_saved)  # noqa: SLF001
        for writer in writers
        if writer._last_checkpoint_saved and not writer.save_weights_only  # noqa: SLF001
    ]


def _free_path(trainer: Trainer, writer: ModelCheckpoint) -> str:
    """A path that no earlier training has written to, unless this one goes on from there."""
    version, path = 0, f"{writer.dirpath}/{FILE_NAME}.ckpt"
    while writer.file_exists(path, trainer) and str(trainer.ckpt_path) != path:
        version += 1
        path = f"{writer.dirpath}/{FILE_NAME}-v{version}.ckpt"
    return path
