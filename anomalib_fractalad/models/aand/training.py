# SPDX-License-Identifier: Apache-2.0
"""The training of AAND in two stages: which part is trained at a step, and at which rate."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from anomalib.data import ImageBatch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalib_fractalad.models.components import is_finite
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.training.schedules import epoch_length, scheduled

from .stages import Stage, StagePlan
from .torch_model import AANDModel

logger = logging.getLogger(__name__)


class StagedTraining(OneClassModule):
    """Stage I trains the amplifiers, stage II the student.

    Attributes:
        split: Shares of the training that stage I and stage II get.
        learning_rate: Learning rate at the start of each stage.
        plan: How the training is divided, once it has begun.
    """

    model: AANDModel
    split: tuple[float, float]
    learning_rate: float
    plan = StagePlan(0, 0)
    untrained_because = (
        "its student never took a step, since the training ended before stage II (distillation), or never began. Train "
        "it, or go on from its last checkpoint (ckpt_path) until stage II is done"
    )
    _announced: Stage | None = None

    @property
    def stage(self) -> Stage:
        """The stage that the next optimizer step belongs to."""
        return self.plan.stage(self.trainer.global_step)

    def on_fit_start(self) -> None:
        """Refuse a training that has no end, which cannot be divided.

        Raises:
            ValueError: If the trainer limits neither epochs nor steps.
        """
        super().on_fit_start()
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            msg = "max_epochs is -1; AAND has to know the end of training to divide it: set max_epochs or max_steps"
            raise ValueError(msg)

    def on_train_start(self) -> None:
        """Divide the training among the stages, and go on at the rates of this division.

        Raises:
            ValueError: If the training data have no length and the trainer does not limit the steps.
        """
        super().on_train_start()
        if math.isinf(self.training_steps):
            msg = "the training data have no length; AAND has to know the end of training to divide it: set max_steps"
            raise ValueError(msg)
        epoch = epoch_length(self.trainer)
        steps = 1 if math.isinf(epoch) else int(epoch)
        recorded, self.plan = self.plan, StagePlan.divide(int(self.training_steps), steps, self.split)
        self._announced = None
        if not self.trainer.ckpt_path:
            return
        self.plan = self.plan.after(recorded, self.trainer.global_step)
        if isinstance(schedule := self.lr_schedulers(), LambdaLR):
            rates = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, rate, factor in rates:
                group["lr"] = rate * factor(schedule.last_epoch)

    def on_train_end(self) -> None:
        """Warn where the training has ended within stage I."""
        super().on_train_end()
        step, plan = self.trainer.global_step, self.plan
        if step <= plan.amplification and plan.distillation and self.trainer.is_global_zero:
            logger.warning(
                "The training of AAND ended within stage I, amplification, after step %d of %d: the student never took "
                "a step, and maps and scores mean nothing. Go on from the last checkpoint (ckpt_path) until stage II, "
                "distillation, is done, another %d steps; early stopping and time limits have to leave it its time.",
                step,
                plan.amplification,
                plan.distillation,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how the training is divided."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage_plan"] = asdict(self.plan)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember how the training was divided, for the case that it goes on."""
        super().on_load_checkpoint(checkpoint)
        self.plan = StagePlan.recorded(checkpoint)

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Say which stage runs, where it begins and where training resumes."""
        del batch, batch_idx
        if self.stage is not self._announced:
            self._announced = self.stage
            first = self.trainer.global_step + 1
            last = self.plan.amplification + (self.plan.distillation if self.stage is Stage.DISTILLATION else 0)
            rank_zero_info(f"AAND stage {self.stage} of 2, {self.stage.name.lower()}: steps {first} to {last}")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, with weights, moments and a schedule for each stage."""
        parts = {Stage.AMPLIFICATION: self.model.amplifiers, Stage.DISTILLATION: self.model.student}
        groups = [{"name": stage.name.lower(), "params": list(part.parameters())} for stage, part in parts.items()]
        optimizer = Adam(groups, lr=self.learning_rate, betas=(0.5, 0.999))
        # Lightning makes the schedule before it knows the length of the training, but asks for a rate only afterwards.
        return scheduled(optimizer, *map(self._schedule_of, parts))

    def _schedule_of(self, stage: Stage) -> Callable[[int], float]:
        return lambda step: self.plan.lr_factor(stage, step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the weights of the other stage, and Adam's moments of them, as they are."""
        del optimizer
        for parameter in self._idle_parameters():
            parameter.grad = None

    def nothing_of_idle_weights(self) -> Tensor | float:
        """Zero, with a gradient of zero for the weights of the other stage, which distributed training waits for.

        They are sums over no values, and zero even where a weight is infinite or not a number.
        """
        if self.trainer.world_size == 1:
            return 0.0
        return torch.stack([parameter[:0].sum() for parameter in self._idle_parameters()]).sum()

    def _idle_parameters(self) -> Iterator[nn.Parameter]:
        idle = self.model.student if self.stage is Stage.AMPLIFICATION else self.model.amplifiers
        return idle.parameters()


def check_split(split: Sequence[float]) -> tuple[float, float]:
    """Refuse what cannot divide a training.

    Args:
        split: Shares of both stages.

    Returns:
        The shares.

    Raises:
        ValueError: If there are not two, both finite, the first 0 or more and the second above 0.
    """
    if len(split) != 2 or not all(map(is_finite, split)) or split[0] < 0 or split[1] <= 0:
        msg = (
            f"split is {tuple(split)}; it must be two finite shares, stage I's 0 or more and stage II's above 0, "
            "such as (100, 120)"
        )
        raise ValueError(msg)
    return split[0], split[1]
