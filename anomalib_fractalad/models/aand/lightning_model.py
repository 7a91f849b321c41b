# SPDX-License-Identifier: Apache-2.0
"""AAND: Advancing Pre-trained Teacher, Towards Robust Feature Discrepancy for Anomaly Detection.

Tang, Zhou, Li, Dong, Wang, IEEE TIP 2026, arXiv 2405.02068.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from anomalib_fractalad.models.components import (
    AnomalyGenerator,
    DistillationModule,
    GeneratorChoice,
    Reduction,
    check_positive,
)
from anomalib_fractalad.transforms.foreground import object_mask

from .amplification import ResidualAnomalyAmplification
from .loss import AmplificationLoss, GateLoss, HardDistillationLoss, PlainDistillationLoss
from .stages import Stage, StagePlan
from .student import PUBLISHED_STRIDES
from .torch_model import AANDModel, Alignment

ANOMALY_PROBABILITY = 0.8
REDRAWS = 10
MASK_THRESHOLD = 0.3
AMPLIFICATION_WEIGHT = 0.1
NORMAL_POSITIONS = 5000
ANOMALOUS_POSITIONS = 1000


class AAND(DistillationModule, AnomalibModule):
    """AAND, trained in two stages: amplify the teacher's anomalies, then distil its normal features.

    Args:
        backbone: Name of a timm CNN with feature levels at the strides, for the teacher.
        pre_trained: Load ImageNet weights into the teacher.
        weights: Local timm checkpoint (.safetensors, or .pth with nothing but weights) for the teacher, in place of
            ImageNet weights: no network is needed.
        split: Shares of the training that stage I (amplification) and stage II (distillation) get, in whole epochs;
            [0, 1] leaves stage I out, which is plain reverse distillation.
        hard_distillation: Weigh the positions that the student reproduces worst. Without it the loss is reverse
            distillation's.
        anomaly_generator: What makes the anomalies of stage I: PerlinAnomalyGenerator or FractalAnomalyGenerator, by
            name, as class_path and init_args, or as an object. Left out, it is Perlin with probability 0.8.
        anomaly_source_path: Folder of texture images for the Perlin generator.
        object_mode: Keep anomalies on the object, and leave the background out of what they are compared with. For
            single objects on a plain background.
        score: Image score from the anomaly map: max (published), mean, or top, the mean of the highest pixels.
        top_share: Share of the pixels, above 0 and at most 1, that the score top takes.
        strides: Strides of the stages whose features are compared, each twice the one before: coarse ones see more
            context and cost less, fine ones see smaller defects. 4, 8 and 16 are the published ones.
        alignment: How the stages' maps are brought to the image's size: corners (published) stretches them from border
            to border, which shifts them by up to the stride; centres puts position i at pixel stride x i, the centre of
            what it sees in a CNN that pads evenly, as ResNets do. It can be changed when a checkpoint is loaded;
            validate once more then, for the thresholds.
        amplifier_width: Channels of the hidden layers that amplify anomalies. Left out, twice those of the stage and at
            most 1024, as published; few are much faster.
        fine_embedding: Let the student decode from an embedding as fine as the coarsest stage, with as many values as
            the published one, which is half as fine. The student is then the package's small one for every backbone.
        learning_rate: Learning rate of Adam at the start of each stage. It falls to a fifth after 80 % of the stage and
            again after 90 %.
        epochs: Training length in epochs, both stages together, for callers that cannot set the trainer's, such as
            anomalib's benchmark. Left out, the trainer's max_epochs rules.
        pre_processor: Pre-processor, or whether to use the default, which resizes to 256x256. It must not normalise.
        post_processor: Post-processor, or whether to use anomalib's default.
        evaluator: Evaluator, or whether to use the default metrics.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        ValueError: If an argument is out of range, or the backbone is unknown or lacks a feature level.
        RuntimeError: If the pre-trained weights cannot be loaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fractalad import AAND, SurfaceDefects
        >>> Engine(max_epochs=22).train(AAND(), datamodule=SurfaceDefects())  # doctest: +SKIP
    """

    model: AANDModel
    plan = StagePlan(0, 0)
    _announced: Stage | None = None

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        weights: str | Path | None = None,
        split: tuple[float, float] = (100, 120),
        hard_distillation: bool = True,
        anomaly_generator: GeneratorChoice = None,
        anomaly_source_path: str | Path | None = None,
        object_mode: bool = False,
        score: Reduction = "max",
        top_share: float = 0.005,
        strides: Sequence[int] = PUBLISHED_STRIDES,
        alignment: Alignment = "corners",
        amplifier_width: int | None = None,
        fine_embedding: bool = False,
        learning_rate: float = 0.005,
        epochs: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_positive(learning_rate=learning_rate, epochs=epochs)
        split = _check_split(split)
        generator = AnomalyGenerator(anomaly_generator, anomaly_source_path, probability=ANOMALY_PROBABILITY)
        # What a checkpoint records.
        anomaly_generator, anomaly_source_path = generator.spec, None  # type: ignore[assignment]
        weights = None if weights is None else str(weights)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.split = split
        self.generator = generator
        self.object_mode = object_mode
        self.model = AANDModel(
            backbone,
            pre_trained,
            amplification=split[0] > 0,
            score=score,
            top_share=top_share,
            weights=weights,
            strides=strides,
            alignment=alignment,
            amplifier_width=amplifier_width,
            fine_embedding=fine_embedding,
        )
        self.gate_loss = GateLoss()
        self.amplification_loss = AmplificationLoss()
        self.distillation_loss = HardDistillationLoss() if hard_distillation else PlainDistillationLoss()

    @property
    def stage(self) -> Stage:
        """The stage that the next optimiser step belongs to."""
        return self.plan.stage(self.trainer.global_step)

    def on_fit_start(self) -> None:
        """Refuse normalised images and a training that has no end, which cannot be divided.

        Raises:
            ValueError: If the pre-processor normalises images, if the trainer limits neither epochs nor steps, or if
                the anomaly generator that a checkpoint records cannot be built.
        """
        super().on_fit_start()
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            msg = "max_epochs is -1; AAND has to know the end of training to divide it: set max_epochs or max_steps"
            raise ValueError(msg)
        if self.model.amplifiers:
            self.generator.prepare()

    def on_train_start(self) -> None:
        """Divide the training among the stages."""
        super().on_train_start()
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        self.plan = StagePlan.divide(int(self.training_steps), math.ceil(batches), self.split)
        self._announced = None

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Say which stage runs, where it begins and where training resumes."""
        del batch, batch_idx
        if self.stage is not self._announced:
            self._announced = self.stage
            first = self.trainer.global_step + 1
            last = self.plan.amplification + (self.plan.distillation if self.stage is Stage.DISTILLATION else 0)
            rank_zero_info(f"AAND stage {self.stage} of 2, {self.stage.name.lower()}: steps {first} to {last}")

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Take a step of the stage that training has come to.

        Args:
            batch: Normal images (B, 3, H, W), values in [0, 1].
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The loss.
        """
        del args, kwargs
        images = self.training_images(batch)
        parts = self._amplify(images) if self.stage is Stage.AMPLIFICATION else self._distil(images)
        self.log("stage", float(self.stage), prog_bar=True, batch_size=len(images))
        loss = self.log_losses(torch.stack(list(parts.values())).sum(), parts, batch)
        if self.trainer.world_size > 1:
            # Distributed training waits for a gradient of every weight.
            loss = loss + 0 * sum(parameter.sum() for parameter in self._idle_parameters())
        return loss

    def _amplify(self, images: Tensor) -> dict[str, Tensor]:
        foreground = object_mask(images) if self.object_mode else torch.ones_like(images[:, :1], dtype=torch.bool)
        anomalous_images, mask = anomalies_within(foreground, images, self.generator)
        amplifiers = cast("Iterable[ResidualAnomalyAmplification]", self.model.amplifiers)
        focal, amplification = [], []
        for amplifier, features in zip(amplifiers, self.model.teacher(anomalous_images), strict=True):
            is_anomalous = shrink_mask(mask, features)
            is_normal = shrink_mask(foreground, features) & ~is_anomalous
            focal.append(self.gate_loss(amplifier.gate(features), is_anomalous))
            normal = draw_positions(features, is_normal, NORMAL_POSITIONS)
            anomalous = draw_positions(features, is_anomalous, ANOMALOUS_POSITIONS)
            # The true mask stands in for the gate. It is 1 at these positions, and the loss sees no other residuals.
            amplified = anomalous + amplifier.generator(anomalous[..., None, None]).flatten(1)
            amplification.append(self.amplification_loss(normal, anomalous, amplified))
        return {
            "focal": torch.stack(focal).sum(),
            "amplification": AMPLIFICATION_WEIGHT * torch.stack(amplification).sum(),
        }

    def _distil(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = self.model.advanced_teacher(images)
        return {"distillation": self.distillation_loss(teacher, self.model.student(teacher))}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, with weights, moments and a schedule for each stage."""
        parts = {Stage.AMPLIFICATION: self.model.amplifiers, Stage.DISTILLATION: self.model.student}
        groups = [{"name": stage.name.lower(), "params": list(part.parameters())} for stage, part in parts.items()]
        optimizer = Adam(groups, lr=self.learning_rate, betas=(0.5, 0.999))
        # Lightning makes the schedule before it knows the length of the training, but asks for a rate only afterwards.
        schedule = LambdaLR(optimizer, [self._schedule_of(stage) for stage in parts])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _schedule_of(self, stage: Stage) -> Callable[[int], float]:
        return lambda step: self.plan.lr_factor(stage, step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the weights of the other stage, and Adam's moments of them, as they are."""
        del optimizer
        for parameter in self._idle_parameters():
            parameter.grad = None

    def _idle_parameters(self) -> Iterator[nn.Parameter]:
        idle = self.model.student if self.stage is Stage.AMPLIFICATION else self.model.amplifiers
        return idle.parameters()


def anomalies_within(foreground: Tensor, images: Tensor, generator: AnomalyGenerator) -> tuple[Tensor, Tensor]:
    """Make anomalies that stay within a foreground.

    Anomalies that miss it are drawn anew, up to ten times; then the image stays normal.

    Args:
        foreground: (B, 1, H, W), true on the foreground.
        images: (B, C, H, W), values in [0, 1].
        generator: Makes the anomalies.

    Returns:
        The images with anomalies, (B, C, H, W), and their masks, (B, 1, H, W), true or false.
    """
    anomalous, mask = generator(images)
    drawn = mask.flatten(1).any(dim=1)
    inside = (mask > 0) & foreground
    for _ in range(REDRAWS):
        missed = drawn & ~inside.flatten(1).any(dim=1)
        if not missed.any():
            break
        anomalous[missed], redrawn = generator(images[missed])
        inside[missed] = (redrawn > 0) & foreground[missed]
    return torch.where(foreground, anomalous, images), inside


def shrink_mask(mask: Tensor, features: Tensor) -> Tensor:
    """Bring a mask to the size of a stage: true where more than 0.3 of the area is.

    Args:
        mask: (B, 1, H, W).
        features: (B, C, h, w).

    Returns:
        (B, 1, h, w), true or false.
    """
    return F.interpolate(mask.float(), size=features.shape[-2:], mode="area") > MASK_THRESHOLD


def draw_positions(features: Tensor, where: Tensor, count: int) -> Tensor:
    """Draw positions at random, at most ``count`` in the whole batch.

    Args:
        features: (B, C, H, W).
        where: Positions to draw from, (B, 1, H, W), true or false.
        count: Number of positions to draw.

    Returns:
        Features of the positions, (N, C).
    """
    positions = where.squeeze(1).nonzero()
    image, row, column = positions[torch.randperm(len(positions), device=positions.device)[:count]].T
    return features[image, :, row, column]


def _check_split(split: Sequence[float]) -> tuple[float, float]:
    if len(split) != 2 or split[0] < 0 or split[1] <= 0:
        msg = (
            f"split is {tuple(split)}; it must be two shares, stage I's 0 or more and stage II's above 0, such as "
            "(100, 120)"
        )
        raise ValueError(msg)
    return split[0], split[1]
