# SPDX-License-Identifier: Apache-2.0
"""FractalMemory: how does a place differ from the nearest normal one?"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

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
from torch.optim import AdamW, Optimizer

from anomalib_fractalad.models.components import (
    ImageScore,
    Reduction,
    check_count,
    check_not_negative,
    check_positive,
    recorded,
)
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.models.components.smoothing import GaussianSmoothing
from anomalib_fractalad.training.schedules import epoch_length, scheduled
from anomalib_fractalad.transforms import LightingJitter, MixedAnomalyGenerator

from .calibration import Calibration
from .gathering import MOST_HELD, Gathering
from .loss import SegmentationLoss
from .parts import check_pattern, part_number
from .stages import Stage, StagePlan
from .statistics import check_level_weights, check_sizes
from .torch_model import FractalMemoryModel

IMAGE_SIZE = 320, 320
WEIGHT_DECAY = 0.01
NORMAL_SHARE = 4  # anomalous images for each normal one
SMALLEST_SHARE = 1 / 16  # of the memory, that an image is compared with in training
GRADIENT_NORM = 1.0
LIGHT_COPIES = 2  # of each training image, where there are any


class FractalMemory(OneClassModule, AnomalibModule):
    """FractalMemory: the distances of whitened features from the nearest normal ones, level by level.

    It trains for one epoch, which gathers features, whatever the trainer's max_epochs is. A head that has a vote
    in maps is an option; then the first epoch gathers, and all others train the head.

    Args:
        backbone: Name of a timm CNN with feature levels at strides 4, 8 and 16, for the teacher.
        pre_trained: Load ImageNet weights into the teacher.
        weights: Local timm checkpoint (.safetensors, or .pth with nothing but weights) for the teacher, in place of
            ImageNet weights: no network is needed.
        memory_size: Number of normal descriptors that the memory holds of each level.
        reservoir_size: Number of descriptors, drawn evenly from all images, that the memory is chosen from. With the
            memory it bounds what is held, however many images there are.
        level_weights: What the levels at strides 4, 8 and 16 count in the distance. Before that, each level's distance
            is divided by its range over normal places.
        saturation: How early a level's distance saturates in the map: beyond its median over normal places, at about
            its range over these, divided by this number. At 0 it counts in full, and the surroundings of a strong
            defect come to more than a weak one.
        part_pattern: Regular expression that finds, in a file's name, which part the image shows. In training, an image
            is never compared with others of its own part. Left out, each image is a part.
        lighting: Strength of the change of light in two copies of each training image, which count as normal, too. At
            0.5, contrast changes by up to 10 %, brightness by up to 0.05, tint by up to 2 %. At 0 there are no copies.
        head: Train a head that makes maps more exact, in all epochs after the first; nine in all are enough for 250
            images. Without it width and learning_rate have no effect.
        width: Channels of the head.
        sigma: Standard deviation in pixels of the smoothing of maps.
        score: Image score from the anomaly map: top, the mean of the highest pixels, max or mean.
        top_share: Share of the pixels, above 0 and at most 1, that the score top takes.
        learning_rate: Highest learning rate of AdamW.
        epochs: Training length in epochs, for callers that cannot set the trainer's, such as anomalib's benchmark.
            Left out, the trainer's max_epochs rules.
        roi: Region of interest: a mask image with the proportions of the images, white on what counts. What lies
            outside is neither trained on nor scored nor shown. Left out, all counts.
        pre_processor: Pre-processor, or whether to use the default, which resizes to 320x320. It must not normalize.
        post_processor: Post-processor, or whether to use the default, OrderPreservingPostProcessor.
        evaluator: Evaluator, or whether to use the default metrics.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        ValueError: If an argument is out of range, part_pattern is no regular expression, or the backbone is unknown or
            lacks a level at stride 4, 8 or 16.
        RuntimeError: If the pre-trained weights cannot be loaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fractalad import FractalMemory, SurfaceDefects
        >>> Engine().train(FractalMemory(), datamodule=SurfaceDefects())  # doctest: +SKIP
    """

    model: FractalMemoryModel
    architecture: ClassVar = {"backbone": str, "memory_size": int, "head": bool, "width": int}
    training_only: ClassVar = frozenset(
        {"learning_rate", "reservoir_size", "level_weights", "part_pattern", "lighting"}
    )
    untrained_because = (
        "its memory is empty, since the training ended before all features were gathered, or never began. Train it, or "
        "go on from its last checkpoint (ckpt_path)"
    )
    plan = StagePlan(0, 0)
    _announced: Stage | None = None
    _gathered_states: tuple[dict[str, Any], ...] = ()

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        pre_trained: bool = True,
        weights: str | Path | None = None,
        memory_size: int = 2000,
        reservoir_size: int = 320_000,
        level_weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        saturation: float = 1.0,
        part_pattern: str | None = None,
        lighting: float = 0.0,
        head: bool = False,
        width: int = 64,
        sigma: int = 5,
        score: Reduction = "top",
        top_share: float = 0.005,
        learning_rate: float = 0.002,
        epochs: int | None = None,
        roi: str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_sizes(memory_size, reservoir_size)
        check_positive(learning_rate=learning_rate)
        check_count(epochs=epochs)
        check_pattern(part_pattern)
        check_level_weights(level_weights)
        check_not_negative(lighting=lighting)
        weights, roi = recorded(weights, roi)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.reservoir_size = reservoir_size
        self.level_weights = level_weights
        self.part_pattern = part_pattern
        self.light_jitter = LightingJitter(lighting, noise=0)
        self.generator = MixedAnomalyGenerator()
        self.model = FractalMemoryModel(
            backbone, pre_trained, memory_size, saturation, head, width, sigma, score, top_share, weights
        )
        self.loss = SegmentationLoss()
        self.set_roi(roi)
        # Lightning counts steps of an optimizer, and an optimizer has to have a weight.
        self.idle = nn.Parameter(torch.zeros(1)) if self.model.head is None else None
        self._gathering: Gathering | None = None
        self._calibration: Calibration | None = None

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to (height, width), 320x320 by default, and nothing else: the network normalizes by itself."""
        return OneClassModule.configure_pre_processor(image_size or IMAGE_SIZE)

    @staticmethod
    def sets_own_length(arguments: Mapping[str, Any]) -> bool:
        """Whether a model of these arguments trains for one epoch, whatever it is told."""
        return not arguments.get("head")

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer settings that the model insists on: a single epoch, where there is no head to train."""
        return super().trainer_arguments | ({"max_epochs": 1} if self.model.head is None else {})

    @property
    def trained_weights(self) -> list[nn.Parameter]:
        """What the optimizer trains."""
        return list(self.model.trained_head.parameters()) if self.idle is None else [self.idle]

    @property
    def stage(self) -> Stage:
        """The stage that the next optimizer step belongs to."""
        return self.plan.stage(self.trainer.global_step)

    def on_fit_start(self) -> None:
        """Refuse normalized images, and a training that has no end.

        Raises:
            ValueError: If the pre-processor normalizes images, or if the trainer limits neither epochs nor steps.
        """
        super().on_fit_start()
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            msg = "max_epochs is -1; FractalMemory has to know the end of training: set max_epochs or max_steps"
            raise ValueError(msg)

    def on_train_start(self) -> None:
        """Divide the training among the stages, and take up what a checkpoint has gathered."""
        super().on_train_start()
        if math.isinf(self.training_steps):
            msg = "the training data have no length; FractalMemory has to know the end of training: set max_steps"
            raise ValueError(msg)
        recorded = self.plan
        self.plan = StagePlan.divide(
            int(self.training_steps), epoch_length(self.trainer), head=self.model.head is not None
        )
        self._announced = None
        states = self._gathered_states if self.trainer.ckpt_path else ()
        held = MOST_HELD if self.model.head is not None else 0
        self._gathering = Gathering(self.model.teacher.channels, self.reservoir_size, self.device, held)
        if states:
            self._gathering.load(states[min(self.global_rank, len(states) - 1)])
        if self._gathering.finished:  # what is gathered stays gathered, however long the training is now
            self.plan = self.plan.after(recorded)
        self._calibration = None
        if self.stage is Stage.HEAD:
            self._fill_memory()

    def _fill_memory(self) -> None:
        """Fill the memory with what was gathered, if it is not."""
        gathering = cast("Gathering", self._gathering)
        if not gathering.finished:  # a checkpoint of the last step of the gathering was written just before
            rank_zero_info("FractalMemory fills its memory")
            gathering.finish(self.model, self.level_weights)
        if self.model.head is not None:
            self._calibration = Calibration(gathering)
            self._calibration(self.model, trained=self.trainer.global_step > self.plan.gathering)

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:
        """Say which stage runs, where it begins and where training resumes."""
        del batch, batch_idx
        if self.stage is not self._announced:
            self._announced = self.stage
            first = self.trainer.global_step + 1
            last = self.plan.gathering + (self.plan.head if self.stage is Stage.HEAD else 0)
            stages = 1 if self.model.head is None else 2
            what = "gathers normal features" if self.stage is Stage.GATHERING else "trains the head"
            rank_zero_info(f"FractalMemory stage {self.stage} of {stages} {what}: steps {first} to {last}")

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
        images, inside = self.training_views(batch)
        owner = self.owners_of(batch).repeat(len(images) // batch.batch_size)
        self.log("stage", float(self.stage), prog_bar=True, batch_size=len(images))
        # Distributed training waits for a gradient of every weight.
        nothing = torch.stack([parameter[:0].sum() for parameter in self.trained_weights]).sum()
        gathering = cast("Gathering", self._gathering)
        if self.stage is Stage.GATHERING:
            gathering.add(self.model.teacher, images, owner, inside)
            for _ in range(LIGHT_COPIES if self.light_jitter.strength else 0):
                gathering.add(self.model.teacher, self.light_jitter(images), owner, inside, copies=True)
            return nothing
        # On the CPU, where the numbers of parts are: nothing waits for an accelerator.
        learned = (~torch.isin(owner, gathering.held_owners)).nonzero().squeeze(1)
        if not len(learned):
            return nothing
        rows = learned.to(self.device, non_blocking=True)
        parts = self._segment(images[rows], owner[learned], None if inside is None else inside[rows])
        return self.log_losses(torch.stack(list(parts.values())).sum(), parts, batch)

    def _segment(self, images: Tensor, owner: Tensor, inside: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of anomalous and of some normal images, each compared with a memory without its own part."""
        anomalous, mask = self.generator(images)
        if inside is not None:
            anomalous, mask = torch.where(inside, anomalous, images), mask * inside
        chosen = torch.randperm(len(images))[: math.ceil(len(images) / NORMAL_SHARE)]
        owner = torch.cat([owner, owner[chosen]])
        normal = chosen.to(images.device, non_blocking=True)
        mask = torch.cat([mask, torch.zeros_like(mask[normal])])
        with torch.no_grad():
            features = self.model.teacher(torch.cat([anomalous, images[normal]]))
            # A poor memory is farther from what is normal, as the full one is from new images.
            share = SMALLEST_SHARE ** torch.rand(len(owner))
            residual, distances = self.model.compare(features, self.model.memory.hide(owner, share))
            distance = distances.sum(dim=1, keepdim=True)
        mask = F.interpolate(mask, size=[2 * side for side in distance.shape[-2:]], mode="area")
        for axis in (-1, -2):
            if torch.rand(()) < 0.5:
                residual, distance, mask = residual.flip(axis), distance.flip(axis), mask.flip(axis)
        losses: dict[str, Tensor] = self.loss(self.model.trained_head(residual, distance), mask)
        return losses

    def owners_of(self, batch: ImageBatch) -> Tensor:
        """Numbers of the parts that images show.

        Args:
            batch: Images with their paths.

        Returns:
            (B,), on the CPU, equal for images of one part.
        """
        paths = batch.image_path or [f"{self.global_rank} {self.trainer.global_step} {i}" for i in range(len(batch))]
        numbers = [part_number(str(path), self.part_pattern) for path in paths]
        return torch.tensor(numbers)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Fill the memory when all is gathered, and scale the maps where an epoch or the training ends."""
        super().on_train_batch_end(*args, **kwargs)
        if self.stage is Stage.GATHERING:
            return
        if not cast("Gathering", self._gathering).finished:
            self._fill_memory()
        elif self._calibration is not None and (
            self.trainer.is_last_batch or self.trainer.global_step >= self.training_steps
        ):
            self._calibration(self.model, trained=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is gathered beside the weights."""
        super().on_save_checkpoint(checkpoint)
        if self._gathering is not None:
            checkpoint["gathered"] = self._gathering.states()
        checkpoint["stage_plan"] = asdict(self.plan)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what a training that is resumed has gathered."""
        super().on_load_checkpoint(checkpoint)
        self._gathered_states = tuple(checkpoint.get("gathered", ()))
        self.plan = StagePlan(**checkpoint.get("stage_plan", {"gathering": 0, "head": 0}))

    def forget_training(self) -> None:
        """Drop what was gathered, images among it."""
        super().forget_training()
        self._gathering, self._calibration, self._gathered_states = None, None, ()

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; see the base class."""
        super().apply_arguments(arguments)
        self.model.score = ImageScore(arguments["score"], arguments["top_share"])
        self.model.smooth = GaussianSmoothing(arguments["sigma"]).to(self.device)
        self.model.saturation.strength = arguments["saturation"]

    def is_untrained(self) -> bool:
        """Whether the memory is empty; a head that never took a step does not count."""
        return bool((self.model.memory.owners < 0).all())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the head."""
        optimizer = AdamW(self.trained_weights, lr=self.learning_rate, weight_decay=WEIGHT_DECAY)
        # Lightning makes the schedule before it knows the length of the training, but asks for a rate only afterwards.
        return scheduled(optimizer, lambda step: self.plan.lr_factor(step))  # noqa: PLW0108  # the plan is replaced later

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave the head and AdamW's moments as they are while features are gathered."""
        del optimizer
        if self.stage is Stage.GATHERING:
            for parameter in self.trained_weights:
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Keep the gradient's norm at most 1, unless the trainer says otherwise."""
        value = GRADIENT_NORM if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, value, gradient_clip_algorithm or "norm")
