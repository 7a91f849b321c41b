# SPDX-License-Identifier: Apache-2.0
"""anomalib's post-processing, with a normalization that keeps the order of all scores."""

import logging
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from . import no_validation
from .normal_pixels import NormalPixelThreshold
from .normalization import normalize

logger = logging.getLogger(__name__)


class OrderPreservingPostProcessor(PostProcessor):
    """Thresholds and normalizes as anomalib does, without making different scores equal.

    anomalib cuts normalized scores and maps off at 0 and 1, half the range of validation away from the threshold. Here
    they rise strictly from 0 to 1, with the threshold at 0.5
    (:func:`~anomalib_fractalad.post_processing.normalization.normalize`), so metrics, heat maps and exported maps
    have the order of the raw ones.

    Where no mask of validation shows a defect, the pixel threshold is the value that a small share of the pixels of
    normal validation images exceeds. Without normal images either, it is the image threshold, as in anomalib.

    Before a validation there are no thresholds: scores and maps are raw, and tests and predictions have no labels and
    masks (exported networks compare raw scores with ``1 - sensitivity``).

    Args:
        enable_normalization: Normalize scores and maps. Without it, they are compared with the raw thresholds, and the
            sensitivities must be 0.5.
        enable_thresholding: Predict labels and masks.
        enable_threshold_matching: Let the image threshold stand in for a pixel threshold that is missing, and
            conversely.
        image_sensitivity: Images are anomalous above a normalized score of 1 - ``image_sensitivity``, from 0 to 1.
        pixel_sensitivity: Pixels are anomalous above a normalized value of 1 - ``pixel_sensitivity``, from 0 to 1.
        pixel_false_positive_rate: Where no mask of validation shows a defect, the share of the pixels of its normal
            images that may lie above the pixel threshold, above 0 and below 1.

    Raises:
        ValueError: If a sensitivity or the false positive rate is out of range, or a sensitivity other than 0.5 is
            given without normalization.
    """

    def __init__(
        self,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
        pixel_false_positive_rate: float = 0.001,
    ) -> None:
        for name, value in (("image_sensitivity", image_sensitivity), ("pixel_sensitivity", pixel_sensitivity)):
            if not 0 <= value <= 1:
                msg = f"{name} is {value}; it must be from 0 to 1"
                raise ValueError(msg)
            if not enable_normalization and value != 0.5:
                msg = f"{name} is {value}, which needs normalized scores; leave it at 0.5 or enable_normalization"
                raise ValueError(msg)
        if not 0 < pixel_false_positive_rate < 1:
            msg = f"pixel_false_positive_rate is {pixel_false_positive_rate}; it must be above 0 and below 1"
            raise ValueError(msg)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.pixel_false_positive_rate = pixel_false_positive_rate
        self._normal_pixels: NormalPixelThreshold | None = None  # there during a validation alone, it is large
        self._has_warned = False

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "pixel_false_positive_rate")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Name what is missing where there are no images to validate on, before anything is lost.

        Raises:
            ValueError: If a validation is due and the data module has no validation images.
        """
        del pl_module
        if stage in {"fit", "validate"}:
            self._has_warned = False
            no_validation.check_data(trainer)
        if stage == "validate" and trainer.limit_val_batches == 0 and trainer.is_global_zero:
            logger.warning("limit_val_batches is 0, so this validation does nothing, and thresholds stay as they are.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there will be no validation."""
        if self.enable_thresholding and (cause := no_validation.why_never(trainer)):
            self._warn(trainer, no_validation.message(pl_module, cause, has_thresholds=self._has_thresholds))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if training has ended before a validation."""
        if not self._has_thresholds:
            self._warn(trainer, no_validation.message(pl_module, "training ended before a validation"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there are no thresholds."""
        self._warn_without_thresholds(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if there are no thresholds."""
        self._warn_without_thresholds(trainer, pl_module)

    @property
    def _has_thresholds(self) -> bool:
        """Whether no threshold is missing that is wanted."""
        return not self.enable_thresholding or not bool(self.image_threshold.isnan() | self.pixel_threshold.isnan())

    def _warn_without_thresholds(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_thresholds:
            self._warn(trainer, no_validation.message(pl_module, "it was never validated"))
        elif self.enable_thresholding and self._pixel_threshold.isnan():
            self._warn(
                trainer,
                f"{type(pl_module).__name__} has no pixel threshold, and the image threshold stands in for it: masks "
                "and heat maps may mark much of normal images. Run engine.validate with masks or normal images.",
            )

    def _warn(self, trainer: Trainer, message: str) -> None:
        if not self._has_warned and trainer.is_global_zero:
            logger.warning(message)
        self._has_warned = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a validation that was interrupted has left behind."""
        del trainer, pl_module
        self._normal_pixels = None
        for metric in (
            self._image_threshold_metric,
            self._pixel_threshold_metric,
            self._image_min_max_metric,
            self._pixel_min_max_metric,
        ):
            metric.reset()

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch[Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Collect what thresholds and normalization come from.

        Args:
            trainer: The trainer.
            pl_module: The model.
            outputs: Predictions and ground truth of a batch.
            *args: As for anomalib's.
            **kwargs: Likewise.
        """
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if self.enable_thresholding and outputs.anomaly_map is not None:
            if self._normal_pixels is None:
                self._normal_pixels = NormalPixelThreshold(self.pixel_false_positive_rate).to(self.pixel_min.device)
            maps = scored_pixels(pl_module, outputs.anomaly_map)
            self._normal_pixels.update(maps, outputs.gt_label, outputs.gt_mask)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and normalization."""
        if self._normal_pixels is not None:
            threshold, has_defects = self._normal_pixels.compute()
            self._normal_pixels = None
            if not has_defects:
                self._pixel_threshold_metric.reset()  # blank masks alone say nothing of how high defects are
                self._pixel_threshold.copy_(threshold)
                if threshold.isnan():
                    instead = ", and the image threshold stands in for it" if self.enable_threshold_matching else ""
                    self._warn(
                        trainer,
                        "Validation has neither masks of defects nor images that are known to be normal, so there is "
                        f"no pixel threshold{instead}. Give it one or the other.",
                    )
        super().on_validation_epoch_end(trainer, pl_module)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Normalize and threshold predictions.

        Args:
            predictions: Raw scores (B,) or (B, 1) and anomaly maps (B, 1, H, W), at least one of them.

        Returns:
            Scores and maps in [0, 1], and labels and masks, boolean. Before a validation, scores and maps are raw, and
            labels and masks mean nothing: an exported network, which this is, cannot leave them out.

        Raises:
            ValueError: If there are neither scores nor maps.
        """
        processed = super().forward(predictions)
        if processed.pred_score is None:  # anomalib forgets it without normalization
            score = torch.amax(cast("Tensor", processed.anomaly_map), dim=(-2, -1))
            label = self._apply_threshold(score, self.normalized_image_threshold) if self.enable_thresholding else None
            processed = processed._replace(pred_score=score, pred_label=label)
        return processed

    def threshold_batch(self, batch: Batch[Any]) -> None:
        """Predict labels and masks, where there are thresholds.

        Args:
            batch: Normalized predictions of a batch, completed in place.
        """
        if batch.pred_label is None and not self.image_threshold.isnan():
            batch.pred_label = self._apply_threshold(batch.pred_score, self.normalized_image_threshold)
        if batch.pred_mask is None and not self.pixel_threshold.isnan():
            batch.pred_mask = self._apply_threshold(batch.anomaly_map, self.normalized_pixel_threshold)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """What normalized scores are compared with: 1 - ``image_sensitivity``; raw ones, with the image threshold."""
        return self._output_threshold(self.image_sensitivity, self.image_threshold, self.image_min, self.image_max)

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """What normalized maps are compared with: 1 - ``pixel_sensitivity``; raw ones, with the pixel threshold."""
        return self._output_threshold(self.pixel_sensitivity, self.pixel_threshold, self.pixel_min, self.pixel_max)

    def _output_threshold(self, sensitivity: float, threshold: Tensor, low: Tensor, high: Tensor) -> Tensor:
        normalized = torch.full_like(threshold, 1 - sensitivity, dtype=torch.float32)
        is_raw = low.isnan() | high.isnan() if self.enable_normalization else torch.ones_like(low, dtype=torch.bool)
        return torch.where(is_raw & ~threshold.isnan(), threshold, normalized)

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        """Normalize scores or maps, where the range of validation is known.

        Args:
            preds: Raw scores or maps, of any shape.
            norm_min: Lowest raw value of validation, a scalar; NaN before.
            norm_max: Highest raw value of validation, a scalar; NaN before.
            threshold: Raw threshold, a scalar; where it is NaN, the middle of the range takes its place.

        Returns:
            Values in [0, 1]; raw ones before a validation.
        """
        if preds is None:
            return None
        threshold = torch.where(threshold.isnan(), (norm_max + norm_min) / 2, threshold)
        has_range = ~norm_min.isnan() & ~norm_max.isnan()
        return torch.where(has_range, normalize(preds, norm_min, norm_max, threshold), preds)


def scored_pixels(model: LightningModule | None, anomaly_map: Tensor) -> Tensor:
    """Those pixels of maps that count: all, or with a region of interest those within it.

    Args:
        model: The model, which may have a region.
        anomaly_map: (B, ...).

    Returns:
        (B, ...).
    """
    region = getattr(getattr(model, "model", None), "region", None)
    return anomaly_map if region is None else region.pixels(anomaly_map)
