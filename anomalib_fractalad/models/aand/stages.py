# SPDX-License-Identifier: Apache-2.0
"""Which of AAND's two stages runs at a step of training, and at which learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from anomalib_fractalad.training.schedules import step_decay


class Stage(IntEnum):
    """The stages by their numbers in the paper."""

    AMPLIFICATION = 1
    DISTILLATION = 2


@dataclass(frozen=True)
class StagePlan:
    """The lengths of both stages, in optimizer steps.

    It follows from the length of the training, so that a resumed run of the same length has the same.

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
            steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of an epoch.
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

    @classmethod
    def recorded(cls, checkpoint: Mapping[str, Any]) -> "StagePlan":
        """The plan of the training that a checkpoint comes from.

        Checkpoints of before plans were recorded are told by the steps that Adam has counted for the student; then
        stage II is as long as it had come.

        Args:
            checkpoint: A Lightning checkpoint.

        Returns:
            The plan, or one without a step where nothing can be told.
        """
        if "stage_plan" in checkpoint:
            return cls(**checkpoint["stage_plan"])
        done = 0
        for optimizer in checkpoint.get("optimizer_states", []):
            for group in optimizer["param_groups"]:
                if group.get("name") == Stage.DISTILLATION.name.lower():
                    states = (optimizer["state"].get(parameter) for parameter in group["params"])
                    done = max([done, *(int(state["step"]) for state in states if state)])
        return cls(checkpoint["global_step"] - done, done) if done else cls(0, 0)

    def after(self, earlier: "StagePlan", step: int) -> "StagePlan":
        """This plan for a training that goes on after an earlier one: a finished stage I stays finished.

        Args:
            earlier: The plan of the earlier training.
            step: Optimizer steps done.
        """
        steps = self.amplification + self.distillation
        if 0 < earlier.amplification <= step:
            amplification = earlier.amplification
        elif 0 < self.amplification < step < earlier.amplification:  # it was to be longer, and ends now
            amplification = step
        else:
            amplification = self.amplification
        return StagePlan(amplification, max(steps - amplification, 0))

    def stage(self, step: int) -> Stage:
        """Stage of a step.

        Args:
            step: Optimizer steps done before.
        """
        return Stage.AMPLIFICATION if step < self.amplification else Stage.DISTILLATION

    def lr_factor(self, stage: Stage, step: int) -> float:
        """Factor on a stage's learning rate: x 0.2 after 80 % and again after 90 % of the stage's own length.

        Args:
            stage: The stage.
            step: Optimizer steps done before, from the beginning of the training.
        """
        if stage is Stage.AMPLIFICATION:
            done, length = step, self.amplification
        else:
            done, length = step - self.amplification, self.distillation
        return step_decay(done, length) if length else 1.0
