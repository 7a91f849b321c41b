# SPDX-License-Identifier: Apache-2.0
"""ADPS: Asymmetric Distillation Postsegmentation for Image Anomaly Detection.

Xing, Tang, Tang, Li, IEEE TNNLS 36(4), 2025, arXiv 2210.10495.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import Adam

from anomalib_fractalad.models.components import (
    AnomalyGenerator,
    GeneratorChoice,
    anomalies_within,
    check_count,
    check_positive,
    gaussian_blur,
    recorded,
)
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.training.schedules import scheduled, step_decay

from .loss import AsymmetricDistillationLoss, FocalLoss
from .student import PatchStudent
from .torch_model import LAYERS, ADPSModel

ANOMALY_PROBABILITY = 0.5


class ADPS(OneClassModule, AnomalibModule):
    """ADPS, trained end to end on normal images and anomalies made from them.

    Args:
        backbone: Name of a timm CNN, for teacher and student.
        pre_trained: Load ImageNet weights into the teacher.
        weights: Local timm checkpoint (.safetensors, or .pth with nothing but weights) for the teacher, in place of
            ImageNet weights: no network is needed.
        layers: The levels to compare, from the finest to the coarsest: strides, or names of timm's feature levels such
            as layer1. The default is a ResNet's first three levels.
        patches: The student sees the image in patches x patches parts. 1 is usual, symmetric distillation. Height and
            width of the image must be multiples of patches times the coarsest stride.
        split_layers: Those of layers after which the student's features are split 2 x 2 once more.
        smoothing: Standard deviation, in pixels, of the Gaussian that smooths the anomaly map before its maximum is
            taken as the image score.
        segmentation_weight: Weight of the segmentation loss beside the distillation loss.
        anomaly_generator: What makes anomalies, PerlinAnomalyGenerator or FractalAnomalyGenerator, by name, as
            class_path and init_args, or as an object; any other transform with their contract as an object. Left out,
            it is Perlin's with an anomaly in half of the images.
        anomaly_source_path: Folder of texture images for PerlinAnomalyGenerator.
        learning_rate: Learning rate of Adam. It falls to a fifth after 80 % of the training, and again after 90 %.
        epochs: Training length in epochs, for callers that cannot set the trainer's, such as anomalib's benchmark.
            Left out, the trainer's max_epochs rules.
        roi: Region of interest: a mask image with the proportions of the images, white on what counts. What lies
            outside is neither trained on nor scored nor shown. Left out, all counts.
        pre_processor: Pre-processor, or whether to use the default, which resizes to 256x256. It must not normalize.
        post_processor: Post-processor, or whether to use the default, OrderPreservingPostProcessor.
        evaluator: Evaluator, or whether to use the default metrics.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        TypeError: If ``anomaly_generator`` is of another type.
        ValueError: If an argument is out of range, the backbone is unknown or lacks a feature level, or the folder of
            texture images is empty or of no use to the generator.
        RuntimeError: If the pre-trained weights cannot be loaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fractalad import ADPS, SurfaceDefects
        >>> Engine(max_epochs=20).train(ADPS(), datamodule=SurfaceDefects())  # doctest: +SKIP
    """

    model: ADPSModel
    architecture: ClassVar = {"backbone": str, "layers": list}
    training_only: ClassVar = frozenset({"learning_rate", "segmentation_weight", "anomaly_generator"})

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        weights: str | Path | None = None,
        layers: Sequence[int | str] = LAYERS,
        patches: int = 8,
        split_layers: Sequence[int | str] = (),
        smoothing: float = 4.0,
        segmentation_weight: float = 1.0,
        anomaly_generator: GeneratorChoice = None,
        anomaly_source_path: str | Path | None = None,
        learning_rate: float = 1e-4,
        epochs: int | None = None,
        roi: str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_positive(learning_rate=learning_rate, segmentation_weight=segmentation_weight)
        check_count(epochs=epochs)
        layers, split_layers = tuple(layers), tuple(split_layers)
        generator = AnomalyGenerator(anomaly_generator, anomaly_source_path, probability=ANOMALY_PROBABILITY)
        # What the checkpoint records: plain data, texture folder included.
        anomaly_generator, anomaly_source_path = generator.spec, None  # type: ignore[assignment]
        weights, roi = recorded(weights, roi)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.segmentation_weight = segmentation_weight
        self.generator = generator
        self.model = ADPSModel(backbone, pre_trained, layers, patches, split_layers, smoothing, weights)
        self.set_roi(roi)
        self.distillation_loss = AsymmetricDistillationLoss()
        self.segmentation_loss = FocalLoss()

    def on_fit_start(self) -> None:
        """Refuse what would fail during training.

        Raises:
            ValueError: If the pre-processor normalizes images, if it makes images, or the tiler tiles, of a size that
                cannot be divided into patches, or if the anomaly generator that a checkpoint records cannot be built.
        """
        super().on_fit_start()
        self.generator.prepare()
        self.model.check_size(self.input_size)

    def on_validation_start(self) -> None:
        """Refuse sizes that cannot be divided into patches."""
        self.model.check_size(self.input_size)
        super().on_validation_start()

    def on_test_start(self) -> None:
        """Refuse sizes that cannot be divided into patches."""
        self.model.check_size(self.input_size)
        super().on_test_start()

    def on_predict_start(self) -> None:
        """Refuse sizes that cannot be divided into patches."""
        self.model.check_size(self.input_size)
        super().on_predict_start()

    def before_export(self, input_size: tuple[int, int] | None = None) -> None:
        """Refuse sizes that cannot be divided into patches.

        Raises:
            ValueError: If images or tiles are of such a size.
        """
        self.model.check_size(self.input_size or input_size)
        super().before_export(input_size)

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Make anomalies, compare teacher and student, segment.

        Args:
            batch: Normal images (B, 3, H, W), values in [0, 1].
            *args: Unused.
            **kwargs: Unused.

        Returns:
            The loss.
        """
        del args, kwargs
        images, inside = self.training_views(batch)
        anomalous, mask = self.generator(images) if inside is None else anomalies_within(inside, images, self.generator)
        teacher, distances = self.model.compare(anomalous)
        distillation = self.distillation_loss(distances, mask)
        segmentation = self.segmentation_loss(self.model.segment(teacher, distances), mask)
        loss = distillation + self.segmentation_weight * segmentation
        return self.log_losses(loss, {"distillation": distillation, "segmentation": segmentation}, batch)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over student and decoder; its rate falls at 80 % and 90 % of the training's steps."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = Adam(trainable, lr=self.learning_rate)
        return scheduled(optimizer, lambda step: step_decay(step, self.training_steps))

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; see the base class."""
        super().apply_arguments(arguments)
        if self.generator.spec != arguments["anomaly_generator"]:  # one that was given as an object stays
            self.generator = AnomalyGenerator(arguments["anomaly_generator"])
        self.model.smooth = gaussian_blur(arguments["smoothing"])
        parts = (arguments[name] for name in ("backbone", "layers", "patches", "split_layers"))
        self.model.student = PatchStudent(*parts).to(self.device)  # its weights are the checkpoint's
