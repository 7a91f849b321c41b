# SPDX-License-Identifier: Apache-2.0
"""AAND: Advancing Pre-trained Teacher, Towards Robust Feature Discrepancy for Anomaly Detection.

Tang, Zhou, Li, Dong, Wang, IEEE TIP 2026, arXiv 2405.02068.
"""

from collections.abc import Mapping, Sequence
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
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from anomalib_fractalad.models.components import (
    AlignedUpsample,
    AnomalyGenerator,
    GeneratorChoice,
    ImageScore,
    Reduction,
    anomalies_within,
    check_count,
    check_positive,
    recorded,
)
from anomalib_fractalad.transforms.foreground import object_mask

from .feature_store import FeatureStore
from .loss import AmplificationLoss, GateLoss, HardDistillationLoss, PlainDistillationLoss
from .stages import Stage
from .student import PUBLISHED_STRIDES
from .torch_model import AANDModel, Alignment
from .training import StagedTraining, check_split

ANOMALY_PROBABILITY = 0.8
AMPLIFICATION_WEIGHT = 0.1


class AAND(StagedTraining, AnomalibModule):
    """AAND, trained in two stages: amplify the teacher's anomalies, then distill its normal features.

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
        strides: Strides of the levels whose features are compared, each twice the one before: coarse ones see more
            context and cost less, fine ones see smaller defects. 4, 8 and 16 are the published ones.
        alignment: How the levels' maps are brought to the image's size: corners (published) stretches them from border
            to border, which shifts them by up to the stride; centers puts position i at pixel stride x i, the center of
            what it sees in a CNN that pads evenly, as ResNets do. It can be changed when a checkpoint is loaded;
            validate once more then, for the thresholds.
        amplifier_width: Channels of the hidden layers that amplify anomalies. Left out, twice those of the level and at
            most 1024, as published; few are much faster.
        fine_embedding: Let the student decode from an embedding as fine as the coarsest level, with as many values as
            the published one, which is half as fine. The student is then the package's small one for every backbone.
        keep_features: Keep the amplified features of all images through stage II, so that the teacher looks at each
            once: up to 1 GiB in memory, and the rest in a temporary folder. On a CPU only, and of no use with random
            augmentations.
        learning_rate: Learning rate of Adam at the start of each stage. It falls to a fifth after 80 % of the stage and
            again after 90 %.
        epochs: Training length in epochs, both stages together, for callers that cannot set the trainer's, such as
            anomalib's benchmark. Left out, the trainer's max_epochs rules.
        roi: Region of interest: a mask image with the proportions of the images, white on what counts. What lies
            outside is neither trained on nor scored nor shown. Left out, all counts.
        pre_processor: Pre-processor, or whether to use the default, which resizes to 256x256. It must not normalize.
        post_processor: Post-processor, or whether to use the default, OrderPreservingPostProcessor.
        evaluator: Evaluator, or whether to use the default metrics.
        visualizer: Visualizer, or whether to use anomalib's default.

    Raises:
        ValueError: If an argument is out of range, or the backbone or the anomaly generator is unknown or of no use.
        TypeError: If ``anomaly_generator`` is of another type.
        RuntimeError: If the pre-trained weights cannot be loaded.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib_fractalad import AAND, SurfaceDefects
        >>> Engine(max_epochs=22).train(AAND(), datamodule=SurfaceDefects())  # doctest: +SKIP
    """

    model: AANDModel
    _store: FeatureStore | None = None
    architecture: ClassVar = {
        "backbone": str,
        "strides": list,
        "amplifier_width": str,
        "fine_embedding": bool,
        "split": lambda split: split[0] > 0,
    }
    training_only: ClassVar = frozenset(
        {"learning_rate", "split", "hard_distillation", "anomaly_generator", "object_mode", "keep_features"}
    )

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
        keep_features: bool = False,
        learning_rate: float = 0.005,
        epochs: int | None = None,
        roi: str | Path | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_positive(learning_rate=learning_rate)
        check_count(epochs=epochs)
        split = check_split(split)
        alignment = "centers" if alignment == "centres" else alignment
        generator = AnomalyGenerator(anomaly_generator, anomaly_source_path, probability=ANOMALY_PROBABILITY)
        # What a checkpoint records.
        anomaly_generator, anomaly_source_path = generator.spec, None  # type: ignore[assignment]
        weights, roi = recorded(weights, roi)
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.epochs, self.learning_rate, self.split = epochs, learning_rate, split
        self.generator, self.object_mode, self.keep_features = generator, object_mode, keep_features
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
        self.set_roi(roi)
        self.gate_loss, self.amplification_loss = GateLoss(), AmplificationLoss()
        self.distillation_loss = HardDistillationLoss() if hard_distillation else PlainDistillationLoss()

    def on_fit_start(self) -> None:
        """Refuse what would fail during training.

        Raises:
            ValueError: If the pre-processor normalizes images, if the trainer limits neither epochs nor steps, or if
                the anomaly generator that a checkpoint records cannot be built.
        """
        super().on_fit_start()
        if self.model.amplifiers:
            self.generator.prepare()

    def on_train_start(self) -> None:
        """Make room for features that are kept."""
        super().on_train_start()
        if not self.keep_features:
            return
        if self.device.type == "cpu":
            self._store = FeatureStore(self.model.advanced_teacher)
        else:
            rank_zero_info(f"keep_features has no effect on {self.device.type}, where computing features is quicker")

    def on_train_epoch_end(self) -> None:
        """Count an epoch of the features that are kept."""
        super().on_train_epoch_end()
        if self._store is not None:
            self._store.end_epoch()

    def on_train_end(self) -> None:
        """Forget the features that were kept."""
        super().on_train_end()
        self.forget_training()

    def forget_training(self) -> None:
        """Drop the features that were kept."""
        super().forget_training()
        if self._store is not None:
            self._store.close()
        self._store = None

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
        parts = self._amplify(images, inside) if self.stage is Stage.AMPLIFICATION else self._distill(images)
        self.log("stage", float(self.stage), prog_bar=True, batch_size=len(images))
        return self.log_losses(torch.stack(list(parts.values())).sum(), parts, batch) + self.nothing_of_idle_weights()

    def _amplify(self, images: Tensor, inside: Tensor | None = None) -> dict[str, Tensor]:
        foreground = torch.ones_like(images[:, :1], dtype=torch.bool) if inside is None else inside
        if self.object_mode and inside is None:
            foreground = object_mask(images)
        anomalous_images, mask = anomalies_within(foreground, images, self.generator)
        levels = self.model.compare(anomalous_images, mask, foreground)
        focal = [self.gate_loss(level.gate, level.mask) for level in levels]
        amplification = [self.amplification_loss(level.normal, level.anomalous, level.amplified) for level in levels]
        return {
            "focal": torch.stack(focal).sum(),
            "amplification": AMPLIFICATION_WEIGHT * torch.stack(amplification).sum(),
        }

    def _distill(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            teacher = (self._store or self.model.advanced_teacher)(images)
        return {"distillation": self.distillation_loss(teacher, self.model.student(teacher))}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the checkpoint holds; ``centers`` was spelled ``centres`` once."""
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY) or {}
        if arguments.get("alignment") == "centres":
            arguments["alignment"] = "centers"
        super().on_load_checkpoint(checkpoint)

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; see the base class."""
        super().apply_arguments(arguments)
        if self.generator.spec != arguments["anomaly_generator"]:  # one that was given as an object stays
            self.generator = AnomalyGenerator(arguments["anomaly_generator"])
        self.model.score = ImageScore(arguments["score"], arguments["top_share"])
        for upsample, stride in zip(self.model.upsample, arguments["strides"], strict=True):
            cast("AlignedUpsample", upsample).stride = None if arguments["alignment"] == "corners" else stride
        self.distillation_loss = HardDistillationLoss() if arguments["hard_distillation"] else PlainDistillationLoss()
