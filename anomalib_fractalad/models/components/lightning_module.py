# SPDX-License-Identifier: Apache-2.0
"""What the package's Lightning modules have in common."""

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
import torch.distributed as dist
from anomalib import LearningType
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils.tiler import Tiler
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Score
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils.data import DistributedSampler
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_fractalad.export.module import ExportModule
from anomalib_fractalad.training.checkpoint_io import AtomicCheckpointIO, check_checkpoint
from anomalib_fractalad.training.image_check import check_pictures, leave_out_unreadable

from .tiling import make_tiler, tiler_settings
from .training_check import TrainingCheck

logger = logging.getLogger(__name__)


class DistillationModule(TrainingCheck, ExportModule):
    """Training length, evaluation, export and resuming, the same for every model of the package.

    A model derives from this class first and from :class:`anomalib.models.AnomalibModule` second.

    Attributes:
        training_steps: Optimiser steps of the whole training, once it has begun.
    """

    epochs: int | None
    training_steps: float = math.inf
    _loaded_tiler: Tiler | None = None
    _random_states: Sequence[dict[str, Any]] = ()
    _batches_done = 0
    _validation_is_due = False
    _epoch_state: Mapping[str, Any] = MappingProxyType({})
    _shuffled = False

    @property
    def _tiler(self) -> Tiler | None:
        return cast("Tiler | None", self.model.tiler)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer settings that the model insists on."""
        length = {} if self.epochs is None else {"max_epochs": self.epochs}
        return {"num_sanity_val_steps": 0, **length}

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images alone."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize, and nothing else: anomalies are made on plain images, and the network normalises by itself.

        Args:
            image_size: Height and width. Defaults to (256, 256).
        """
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Anomalib's image and pixel AUROC and F1, and pixel AP (AUPR) and AUPRO.

        Pixel metrics are left out where the data have no masks.
        """
        maps = ["anomaly_map", "gt_mask"]
        return Evaluator(
            test_metrics=[
                AUROC(["pred_score", "gt_label"], "image_"),
                F1Score(["pred_label", "gt_label"], "image_"),
                AUROC(maps, "pixel_", strict=False),
                F1Score(["pred_mask", "gt_mask"], "pixel_", strict=False),
                AUPR(maps, "pixel_", strict=False),
                AUPRO(maps, "pixel_", strict=False),
            ],
        )

    def setup(self, stage: str) -> None:
        """Have checkpoints written as a whole or not at all, and damaged ones refused."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is AnomalibCheckpointIO:
            strategy.checkpoint_io = AtomicCheckpointIO(strategy.checkpoint_io.extra_safe_globals)

    def on_fit_start(self) -> None:
        """Refuse normalised images, and go on with the random numbers of the checkpoint that training resumes from.

        Raises:
            ValueError: If the pre-processor normalises images.
        """
        if self.pre_processor and extract_transforms_by_type(self.pre_processor.transform, Normalize):
            msg = (
                f"the pre-processor of {self.name} must not contain Normalize: anomalies are made on images in [0, 1], "
                "and the network normalises by itself. Leave Normalize out of the pre-processor's transform."
            )
            raise ValueError(msg)
        # Lightning does not know that on_train_start takes the epoch's data up where the checkpoint left them.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        self.train()  # an export or a prediction leaves evaluation mode behind, and Lightning goes on in it
        # Lightning takes the teacher's evaluation mode for an oversight.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        if resumed := self._resumed_state():
            _set_random_state(resumed["epoch"] if self._batches_done else resumed)
            if self._validation_is_due and self.trainer.enable_validation:
                # Lightning shuffles first now, and then validates, for whose loader a number would have been drawn.
                torch.empty((), dtype=torch.int64).random_()
        elif self.global_rank > 0:  # the anomalies of each process are its own
            torch.manual_seed(torch.initial_seed() + (self.global_rank << 32))
        # What Lightning does next is to shuffle the data.
        self._epoch_state = self._start_state = _random_state()
        self._shuffled = True

    def on_train_start(self) -> None:
        """Refuse pictures that cannot be read, learn how many steps training takes, and resume within an epoch.

        To ask for the steps before would shuffle the data before a checkpoint is restored.

        Raises:
            UnreadablePictureError: If pictures to train, validate or test on cannot be read.
        """
        super().on_train_start()
        loaders = CombinedLoader([self.trainer.train_dataloader, self.trainer.val_dataloaders]).flattened
        test_data = getattr(getattr(self.trainer, "datamodule", None), "test_data", None)
        check_pictures([*(loader.dataset for loader in loaders if loader is not None), test_data])
        self._warn_of_repetitions()
        self.training_steps = self.trainer.estimated_stepping_batches
        if self._batches_done and (resumed := self._resumed_state()):
            # Lightning counts the batches that the epoch has had, but does not pass over them.
            for _ in range(self._batches_done):
                next(self.trainer.fit_loop._combined_loader)  # type: ignore[arg-type]  # noqa: SLF001
            _set_random_state(resumed)
        self._start_state = _random_state()

    def _warn_of_repetitions(self) -> None:
        for loader in CombinedLoader(self.trainer.val_dataloaders).flattened:
            sampler = getattr(loader, "sampler", None)
            if not isinstance(sampler, DistributedSampler) or not self.trainer.is_global_zero:
                continue
            pictures = len(sampler.dataset)  # type: ignore[arg-type]
            if sampler.total_size > pictures:
                logger.warning(
                    "Lightning makes %d validation pictures out of %d, to divide them evenly among the processes: some "
                    "count more than once for the thresholds. Validate once more with one process, or take a number of "
                    "processes that divides them.",
                    sampler.total_size,
                    pictures,
                )

    def on_validation_end(self) -> None:
        """Where training resumes with a validation, let it go on as if the data had been shuffled afterwards."""
        super().on_validation_end()
        if self._shuffled:
            _set_random_state(self._start_state)

    def on_train_epoch_start(self) -> None:
        """Note the random state that the data of the epoch are shuffled from."""
        super().on_train_epoch_start()
        if not self._shuffled:
            self._epoch_state = _random_state()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Note that from now on, data are shuffled where an epoch starts."""
        super().on_train_batch_end(*args, **kwargs)
        self._shuffled = False

    def on_train_epoch_end(self) -> None:
        """Where an epoch is resumed after its last batch, let the next one shuffle as if nothing had happened."""
        super().on_train_epoch_end()
        if self._shuffled and (resumed := self._resumed_state()):
            _set_random_state(resumed)
            self._shuffled = False

    def _resumed_state(self) -> dict[str, Any] | None:
        """This process's random state in the checkpoint that training resumes from, if it does."""
        rank = self.global_rank
        return self._random_states[rank] if self.trainer.ckpt_path and rank < len(self._random_states) else None

    def on_predict_start(self) -> None:
        """Leave out pictures that cannot be read, and say which, so that the others are predicted.

        Raises:
            UnreadablePictureError: If none can be read.
        """
        super().on_predict_start()
        datasets = [loader.dataset for loader in CombinedLoader(self.trainer.predict_dataloaders).flattened]
        if left_out := leave_out_unreadable(datasets):
            if self.trainer.is_global_zero:
                logger.warning("\n  ".join([f"{len(left_out)} picture(s) left out of the prediction:", *left_out]))
            loop = self.trainer.predict_loop  # its samplers and workers still have the longer lists
            loop.setup_data()
            loop.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the states of torch's random number generators, of every process, and the tiler beside the weights."""
        super().on_save_checkpoint(checkpoint)
        state = {**_random_state(), "epoch": dict(self._epoch_state)}
        states = [state]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, state)
        checkpoint["random_states"] = states
        if self._tiler is not None:
            checkpoint["tiler"] = tiler_settings(self._tiler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the random number generators' states for a resumed training, and the tiler if none is given."""
        super().on_load_checkpoint(checkpoint)
        self._random_states = checkpoint.get("random_states", [])
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if progress is not None:
            current, is_last = progress["current"], progress["is_last_batch"]
            self._batches_done = 0 if is_last else current["ready"]
            self._validation_is_due = is_last and current["completed"] < current["ready"]
        if self._tiler is None or self._tiler is self._loaded_tiler:
            self._loaded_tiler = make_tiler(**checkpoint["tiler"]) if "tiler" in checkpoint else None
            self.model.tiler = self._loaded_tiler  # type: ignore[assignment]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a trained model; no pre-trained weights are fetched, since the checkpoint holds the teacher's.

        Args:
            checkpoint_path: A Lightning checkpoint.
            *args: As for :meth:`anomalib.models.AnomalibModule.load_from_checkpoint`.
            **kwargs: Likewise; also arguments of the model to override.

        Raises:
            ValueError: If the file is damaged.
        """
        check_checkpoint(checkpoint_path)
        if "weights" not in kwargs:
            kwargs = {"pre_trained": False, "weights": None, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def training_images(self, batch: ImageBatch) -> Tensor:
        """The images of a batch, or with a tiler random tiles of them.

        Args:
            batch: Images (B, 3, H, W).

        Returns:
            (B, 3, H, W), or (4B, 3, h, w) with a tiler.
        """
        images = cast("Tensor", batch.image)
        return images if self._tiler is None else self._tiler.tile(images, use_random_tiling=True)

    def log_losses(self, loss: Tensor, parts: Mapping[str, Tensor], batch: ImageBatch) -> Tensor:
        """Log the loss of a step and its parts.

        Args:
            loss: The loss, a scalar.
            parts: Its parts by name, scalars.
            batch: The images that it comes from.

        Returns:
            The loss.

        Raises:
            FloatingPointError: If a part is infinite or not a number.
        """
        finite = torch.stack(list(parts.values())).isfinite()
        if not finite.all():
            part, value = next((name, value) for name, value in parts.items() if not value.isfinite())
            files = ", ".join(map(str, batch.image_path or ["(no paths given)"]))
            msg = (
                f"the {part} loss of {self.name} is {value.item()} in epoch {self.current_epoch}, step "
                f"{self.global_step}, on the images {files}. If these are in order, lower the learning rate"
                f"{'' if self.trainer.precision.startswith('32') else ' or train with --trainer.precision 32'}, and "
                "go on from the last checkpoint."
            )
            raise FloatingPointError(msg)
        logged = {"train_loss": loss, **{f"train_{name}": part for name, part in parts.items()}}
        self.log_dict(logged, prog_bar=True, batch_size=batch.batch_size)
        return loss

    def validation_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Predict maps and scores of a validation batch."""
        del args, kwargs
        predictions: InferenceBatch = self.model(batch.image)
        return batch.update(**predictions._asdict())  # type: ignore[no-any-return]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state.cpu(), device)
