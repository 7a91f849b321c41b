# SPDX-License-Identifier: Apache-2.0
"""Which of AAND's two stages runs at a step of training, and at which learning rate."""

import math
from dataclasses import dataclass
from enum import IntEnum

from anomalib_fractalad.training.schedules import step_decay


class Stage(IntEnum):
    """The stages by their numbers in the paper."""

    AMPLIFICATION = 1
    DISTILLATION = 2


@dataclass(frozen=True)
class StagePlan:
    """The lengths of both stages, in optimiser steps.

    It follows from the length of the training, so that a resumed run has the same.

    Attributes:
        amplification: Steps of stage I, from the first one.
        distillation: Steps of stage II, from there on.
    """

    amplification: int
    distillation: int

    @classmethod
    def divide(cls, steps: int, steps_per_epoch: int, split: tuple[float, float]) -> "StagePlan":
        """Divide a training.

        Stage I gets its share in whole epochs, and each stage at least one. A training of less than two epochs is
        halved instead, and a single step is stage II's.

        Args:
            steps: Optimiser steps of the whole training.
            steps_per_epoch: Optimiser steps of an epoch.
            split: Shares of both stages; the sum is arbitrary. A share of 0 leaves stage I out.
        """
        share = split[0] / sum(split)
        epochs = steps // steps_per_epoch
        if share == 0:
            amplification = 0
        elif epochs < 2:
            amplification = steps // 2
        else:
            # Halves are rounded up, as everyone expects and round() does not.
            whole = math.floor(steps / steps_per_epoch * share + 0.5)
            amplification = min(max(whole, 1), epochs - 1) * steps_per_epoch
        return cls(amplification, steps - amplification)

    def stage(self, step: int) -> Stage:
        """Stage of a step.

        Args:
            step: Optimiser steps done before.
        """
        return Stage.AMPLIFICATION if step < self.amplification else Stage.DISTILLATION

    def lr_factor(self, stage: Stage, step: int) -> float:
        """Factor on a stage's learning rate: x 0.2 after 80 % and again after 90 % of the stage's own length.

        Args:
            stage: The stage.
            step: Optimiser steps done before, from the beginning of the training.
        """
        if stage is Stage.AMPLIFICATION:
            done, length = step, self.amplification
        else:
            done, length = step - self.amplification, self.distillation
        return step_decay(done, length) if length else 1.0
