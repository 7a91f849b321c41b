# SPDX-License-Identifier: Apache-2.0
"""FractalAD: industrial anomaly segmentation with fractal anomalies and backbone knowledge distillation.

Xia, Lv, He, Li, Liu, Ding, arXiv 2301.12739.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import AdamW

from anomalib_fractalad.models.components import (
    ImageScore,
    Reduction,
    check_count,
    check_not_negative,
    check_positive,
    recorded,
)
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.training.schedules import cosine_decay, scheduled
from anomalib_fractalad.transforms import FractalAnomalyGenerator

from .loss import DistillationLoss, SegmentationLoss
from .torch_model import FractalADModel

WEIGHT_DECAY_WITH_DISTILLATION = 1e-3
WEIGHT_DECAY_WITHOUT_DISTILLATION = 1e-2


class FractalAD(OneClassModule, AnomalibModule):
    """FractalAD, trained end to end on normal images and fractal anomalies made from them.

    Args:
        backbone: Name of a timm CNN with feature levels at strides 4, 8, 16 and 32, for teacher and student.
        pre_trained: Load ImageNet weights into the teacher.
        weights: Local timm checkpoint (.safetensors, or .pth with nothing but weights) for the teacher, in place of
            ImageNet weights: no network is needed.
        distillation: Train a student and segment its features, weighted by their distance to the teacher's. Without
            it the segmentation head reads the teacher's features, which the paper does for textures.
        object_mode: Keep anomalies on the object and scale them to its size. For single objects on a plain background.
        position_margin: Share of height and width, at each border of the image, where no anomalies are made; at most
            0.25. The published 0.1 misses defects at the edges of parts that fill the image: then, take 0.
        score: Image score from the anomaly map: mean (published), max, or top, the mean of the highest pixels, which
            is better where defects are small.
        top_share: Share of the pixels, above 0 and at most 1, that the score top takes.
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW. Left out, it is 0.001 with distillation and 0.01 without, as published.
        cosine_decay: Let the learning rate fall to 0 along a cosine over the training. The published rate is constant,
            so that a short training ends on a better or a worse step by chance.
        epochs: Training length in epochs, for callers that cannot set the trainer's, such as anomalib's benchmark.
            Left out, the trainer's max_epochs rules.
        roi: Region of interest: a mask image with the proportions of the images, white on what counts. What lies
            outside is neither trained on nor scored nor shown. Left out, all counts.
        pre_processor: Pre-processor, or whether to use the default, which resizes to 256x256. It must not normalize.
        post_processor: Post-processor, or whether to use the default, OrderPreservingPostProcessor.
        evaluator: Evaluator, or whether to use the default metrics.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        ValueError: If an argument is out of range, or the backbone is unknown or lacks a level of stride 4, 8, 16, 32.
        RuntimeError: If the pre-trained weights cannot be loaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fractalad import FractalAD, SurfaceDefects
        >>> Engine(max_epochs=20).train(FractalAD(), datamodule=SurfaceDefects())  # doctest: +SKIP
    """

    model: FractalADModel
    architecture: ClassVar = {"backbone": str, "distillation": bool}
    training_only: ClassVar = frozenset(
        {"learning_rate", "weight_decay", "cosine_decay", "object_mode", "position_margin"}
    )

    takes_any_size = True

    def __init__(
        self,
        backbone: str = "resnet18",
        pre_trained: bool = True,
        weights: str | Path | None = None,
        distillation: bool = True,
        object_mode: bool = False,
        position_margin: float = 0.1,
        score: Reduction = "mean",
        top_share: float = 0.005,
        learning_rate: float = 1e-3,
        weight_decay: float | None = None,
        cosine_decay: bool = False,
        epochs: int | None = None,
        roi: str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_positive(learning_rate=learning_rate)
        check_count(epochs=epochs)
        if weight_decay is None:
            weight_decay = WEIGHT_DECAY_WITH_DISTILLATION if distillation else WEIGHT_DECAY_WITHOUT_DISTILLATION
        check_not_negative(weight_decay=weight_decay)
        weights, roi = recorded(weights, roi)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.cosine_decay = cosine_decay
        self.generator = FractalAnomalyGenerator(object_mode=object_mode, position_margin=position_margin)
        self.model = FractalADModel(backbone, pre_trained, distillation, score, top_share, weights)
        self.set_roi(roi)
        self.distillation_loss = DistillationLoss()
        self.segmentation_loss = SegmentationLoss()

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Make anomalies, distill the normal images, segment the anomalous ones.

        Args:
            batch: Normal images (B, 3, H, W), values in [0, 1].
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The loss.
        """
        del args, kwargs
        images, inside = self.training_views(batch)
        normal, anomalous, mask = self.generator.augment(images, inside)
        losses = self.segmentation_loss(self.model.segment(anomalous), mask)
        if self.model.student is not None:
            losses["distillation"] = self.distillation_loss(self.model.teacher(normal), self.model.student(normal))
        return self.log_losses(torch.stack(list(losses.values())).sum(), losses, batch)

    def on_train_start(self) -> None:
        """Refuse a learning rate that is to fall until the end of a training that has none.

        Raises:
            ValueError: If so.
        """
        super().on_train_start()
        if self.cosine_decay and math.isinf(self.training_steps):
            msg = "cosine_decay needs an end of training: set the trainer's max_epochs or max_steps"
            raise ValueError(msg)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over student and head."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)
        if not self.cosine_decay:
            return optimizer
        return scheduled(optimizer, lambda step: cosine_decay(step, self.training_steps))

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; see the base class."""
        super().apply_arguments(arguments)
        self.model.score = ImageScore(arguments["score"], arguments["top_share"])
        margin, object_mode = arguments["position_margin"], arguments["object_mode"]
        self.generator = FractalAnomalyGenerator(object_mode=object_mode, position_margin=margin)
