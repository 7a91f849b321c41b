# SPDX-License-Identifier: Apache-2.0
"""Which of FractalMemory's stages runs at a step of training, and at which learning rate."""

import math
from dataclasses import dataclass
from enum import IntEnum

WARM_UP = 0.1


class Stage(IntEnum):
    """The stages."""

    GATHERING = 1
    HEAD = 2


@dataclass(frozen=True)
class StagePlan:
    """The lengths of both stages, in optimizer steps.

    It follows from the length of the training, so that a resumed run has the same.

    Attributes:
        gathering: Steps in which normal features are gathered, from the first one.
        head: Steps in which the head is trained, from there on.
    """

    gathering: int
    head: int

    @classmethod
    def divide(cls, steps: int, steps_per_epoch: float, *, head: bool = True) -> "StagePlan":
        """Divide a training: the first epoch gathers. A training of one epoch or less is halved instead.

        Args:
            steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of an epoch, or infinity where the data have no length.
            head: Whether there is a head to train; if not, all steps gather.
        """
        if not head:
            return cls(steps, 0)
        gathering = int(steps_per_epoch) if steps > steps_per_epoch else max(steps // 2, 1)
        return cls(gathering, steps - gathering)

    def after(self, earlier: "StagePlan") -> "StagePlan":
        """This plan for a training that goes on after an earlier one, whose gathering is done.

        Args:
            earlier: The plan of the earlier training.
        """
        return StagePlan(earlier.gathering, max(self.gathering + self.head - earlier.gathering, 0))

    def stage(self, step: int) -> Stage:
        """Stage of a step.

        Args:
            step: Optimizer steps done before.
        """
        return Stage.GATHERING if step < self.gathering else Stage.HEAD

    def lr_factor(self, step: int) -> float:
        """Factor on the head's learning rate: up during a tenth of its stage, then down to 0 along a cosine.

        Args:
            step: Optimizer steps done before, from the beginning of the training.
        """
        done = (step - self.gathering + 1) / max(self.head, 1)
        if done < WARM_UP:
            return max(done, 0.0) / WARM_UP
        return (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1.0))) / 2
