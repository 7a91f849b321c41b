# SPDX-License-Identifier: Apache-2.0
"""Learning rates that change with the steps of a training."""

import math
from collections.abc import Callable, Sequence

from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

DECAY = 0.2
DECAY_AT = (0.8, 0.9)


def training_length(trainer: Trainer) -> float:
    """Optimizer steps of a whole training, or infinity where nothing limits them.

    Args:
        trainer: A trainer whose data are set up. To ask before would shuffle them before a checkpoint is restored.
    """
    steps = trainer.estimated_stepping_batches  # -1 where the data have no length and only epochs are limited
    return math.inf if steps < 0 else steps


def epoch_length(trainer: Trainer) -> float:
    """Optimizer steps of an epoch, or infinity where the data have no length.

    Args:
        trainer: A trainer whose data are set up.
    """
    batches = trainer.num_training_batches / trainer.accumulate_grad_batches
    return batches if math.isinf(batches) else math.ceil(batches)


def cosine_decay(step: int, steps: float) -> float:
    """Factor on a learning rate that falls from 1 to 0 along half a cosine.

    Args:
        step: Optimizer steps done.
        steps: Optimizer steps of the whole training.

    Returns:
        A value in [0, 1].
    """
    return (1 + math.cos(math.pi * step / steps)) / 2


def step_decay(step: float, steps: float, at: Sequence[float] = DECAY_AT, factor: float = DECAY) -> float:
    """Factor on a learning rate that falls in steps; by default to a fifth at 80 % and again at 90 %.

    Args:
        step: Optimizer steps done.
        steps: Optimizer steps of the whole training, or of its part.
        at: Shares of the training, in [0, 1], after which the rate falls.
        factor: What the rate falls by.

    Returns:
        A value in (0, 1].
    """
    return factor ** sum(step >= share * steps for share in at)


def scheduled(optimizer: Optimizer, *factors: Callable[[int], float]) -> OptimizerLRSchedulerConfig:
    """An optimizer whose learning rates are set before each step, in the form that Lightning takes.

    Args:
        optimizer: The optimizer.
        *factors: Factor on the learning rate by the steps done; one for all groups of parameters, or one for each.
            The first is asked for only when the training's length is known.
    """
    schedule = LambdaLR(optimizer, factors[0] if len(factors) == 1 else list(factors))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
