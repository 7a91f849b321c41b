# SPDX-License-Identifier: Apache-2.0
"""What the package's Lightning modules have in common."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from anomalib import LearningType
from anomalib.data import ImageBatch, InferenceBatch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from anomalib_fractalad.export.module import ExportModule
from anomalib_fractalad.repairs.callback import RepairedData
from anomalib_fractalad.training.arguments import CheckpointArguments
from anomalib_fractalad.training.callbacks import training_callbacks
from anomalib_fractalad.training.mask_folders import check_mask_folders

from .defaults import DefaultComponents
from .region_module import RegionModule
from .tiled_module import TiledModule
from .training_check import TrainingCheck


class OneClassModule(TrainingCheck, TiledModule, RegionModule, CheckpointArguments, DefaultComponents, ExportModule):
    """A model that learns from normal images alone, in steps of an optimizer.

    A model derives from this class first and from :class:`anomalib.models.AnomalibModule` second.

    Attributes:
        training_steps: Optimizer steps of the whole training, once it has begun.
        loss_parts: Parts of the loss of the last training step, scalars by name.
    """

    epochs: int | None
    training_steps: float = math.inf
    loss_parts: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer settings that the model insists on."""
        return {"num_sanity_val_steps": 0} | ({} if self.epochs is None else {"max_epochs": self.epochs})

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images alone."""
        return LearningType.ONE_CLASS

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, repaired reading of images, and what a training needs beside its model."""
        components = cast("Sequence[Callback]", super().configure_callbacks())
        return [RepairedData(), *components, *training_callbacks(self._trainer)]

    def prepare_data(self) -> None:
        """Refuse a data module that lacks masks, before it is set up."""
        check_mask_folders(getattr(self.trainer, "datamodule", None))

    def before_export(self, input_size: tuple[int, int] | None = None) -> None:
        """Leave out of an export what only a training needs."""
        super().before_export(input_size)
        if self._trainer is None or not self.trainer.training:
            self.forget_training()

    def forget_training(self) -> None:
        """Drop what only a training needs."""

    def log_losses(self, loss: Tensor, parts: Mapping[str, Tensor], batch: ImageBatch) -> Tensor:
        """Log a loss and its parts, scalars, of a batch of images; gives the loss."""
        self.loss_parts = {name: part.detach() for name, part in parts.items()}
        logged = {"train_loss": loss, **{f"train_{name}": part for name, part in parts.items()}}
        self.log_dict(logged, prog_bar=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict maps and scores of a validation batch."""
        del args, kwargs
        predictions: InferenceBatch = self.model(batch.image)
        return self.within_region(batch.update(**predictions._asdict()))  # type: ignore[return-value]

    def test_step(  # type: ignore[override]
        self, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> STEP_OUTPUT:
        """Predict maps and scores of a test batch."""
        return self.validation_step(batch, *args, **kwargs)
