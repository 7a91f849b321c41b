# SPDX-License-Identifier: Apache-2.0
"""The callbacks that every model of the package brings to its trainer."""

import logging

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DistributedSampler

from .checkpoint_io import AtomicCheckpoints
from .epoch_checkpoint import EpochCheckpoint
from .finite_loss import FiniteLoss
from .image_check import ImageCheck
from .loaders import loaders_of
from .plain_images import PlainImages
from .resume import ExactResume
from .schedules import training_length

logger = logging.getLogger(__name__)


def training_callbacks(trainer: Trainer | None) -> list[Callback]:
    """What a training needs beside its model, but what the trainer has already, such as an ImageCheck of the user's.

    Args:
        trainer: The trainer that is going to run, if any.
    """
    kinds: list[type[Callback]] = [AtomicCheckpoints, PlainImages, ImageCheck, TrainingLength, FiniteLoss, ExactResume]
    present = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    if trainer is not None and trainer.state.fn == "fit" and any(isinstance(c, ModelCheckpoint) for c in present):
        kinds.append(EpochCheckpoint)
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in present)]


class TrainingLength(Callback):
    """Tells a module how many steps its training takes, as ``training_steps``, once that is known."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell it, and warn of images that are validated more than once."""
        pl_module.training_steps = training_length(trainer)  # type: ignore[assignment]
        if trainer.is_global_zero:
            warn_of_repetitions(trainer.val_dataloaders)


def warn_of_repetitions(loaders: object) -> None:
    """Warn where images are validated more than once, to divide them among processes.

    Args:
        loaders: What the trainer validates on.
    """
    for loader in loaders_of(loaders):
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            continue
        images = len(sampler.dataset)  # type: ignore[arg-type]
        if sampler.total_size > images:
            logger.warning(
                "Lightning makes %d validation images out of %d, to divide them evenly among the processes: some "
                "count more than once for the thresholds. Validate once more with one process, or take a number of "
                "processes that divides them.",
                sampler.total_size,
                images,
            )
