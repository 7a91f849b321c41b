# SPDX-License-Identifier: Apache-2.0
"""Thresholds that keep a promise about false alarms, from good images alone: split conformal calibration."""

import logging
import math
from typing import Any

import torch
from anomalib.data import AnomalibDataset, Batch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from scipy.special import betaincinv
from torch import Tensor
from torchmetrics import CatMetric

from .normal_pixels import GoodPixelThreshold
from .order_preserving import OrderPreservingPostProcessor, scored_pixels

logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
ROUNDING = 1e-9  # 10 x (1 - 0.1) is 9, not the next number above


def conformal_rank(count: int, rate: float) -> int:
    """Which of the sorted scores is the threshold: ceil((count + 1)(1 - rate)); more than ``count`` if there is none.

    Args:
        count: Number of good values.
        rate: Share of good values that may lie above the threshold.
    """
    return math.ceil((count + 1) * (1 - rate) - ROUNDING)


def smallest_rate(count: int) -> float:
    """The smallest rate of false alarms that ``count`` good images can promise."""
    return 1 / (count + 1)


def images_needed(rate: float) -> int:
    """The number of good images that it takes to promise a rate of false alarms."""
    return max(math.ceil(1 / rate - 1 - ROUNDING), 1)


def upper_bound(count: int, rank: int, confidence: float = CONFIDENCE) -> float:
    """What the rate of false alarms does not exceed, with a confidence, once the threshold is fixed.

    Over the draw of the calibration images, the share of all good images above the ``rank``-th smallest of ``count``
    scores follows the Beta distribution with parameters ``count + 1 - rank`` and ``rank``.

    Args:
        count: Number of calibration images.
        rank: Which of their sorted scores is the threshold.
        confidence: The confidence, above 0 and below 1.

    Returns:
        A rate in (0, 1).
    """
    return float(betaincinv(count + 1 - rank, rank, confidence))


class FalseAlarmThreshold(OrderPreservingPostProcessor):
    """Thresholds that at most a given share of good images, and of good pixels, exceeds; for any anomalib model.

    Split conformal calibration: with n good validation images and the rate a, the image threshold is the
    ceil((n + 1)(1 - a))-th smallest of their scores. Then a good image of the same kind raises an alarm with a
    probability of at most a, whatever the model and the distribution of its scores are, provided that it did not train
    on the validation images. That is an average over calibrations; :attr:`calibration` also tells what the rate does
    not exceed with a confidence of 95 %. Where several images show one part, they are not independent: then n is
    nearer to the number of parts.

    The pixel threshold is found in the same way from all pixels of those images, rounded up by at most 0.2 %. Pixels of
    one image resemble each other, so no confidence is given for it.

    Anomalous validation images move neither threshold. All else is as in :class:`OrderPreservingPostProcessor`: the
    order of all values is kept, thresholds lie at 0.5, and sensitivities other than 0.5 leave the promise behind.

    Args:
        false_alarms: Share of good images that may raise an alarm, above 0 and below 1.
        pixel_false_alarms: Share of the pixels of good images that may be marked, above 0 and below 1.
        image_threshold: A raw score to take as the threshold of images, instead of calibration.
        pixel_threshold: A raw value to take as the threshold of pixels, instead of calibration.
        enable_normalization: Normalize scores and maps; without it, sensitivities must be 0.5.
        enable_thresholding: Predict labels and masks.
        enable_threshold_matching: Let the image threshold stand in for a pixel threshold that is missing, and
            conversely.
        image_sensitivity: Images are anomalous above a normalized score of 1 - ``image_sensitivity``, from 0 to 1.
        pixel_sensitivity: Pixels are anomalous above a normalized value of 1 - ``pixel_sensitivity``, from 0 to 1.

    Attributes:
        calibration: After a validation, plain data: ``images`` (n), ``false_alarms`` (a), ``rank``, ``threshold`` (raw
            score), ``expected_rate`` ((n + 1 - rank) / (n + 1), at most a), ``confidence`` and ``upper_bound`` (what
            the rate does not exceed with that confidence); with maps also ``pixels``, ``pixel_false_alarms`` and
            ``pixel_threshold``. Checkpoints keep it.

    Raises:
        ValueError: If a rate or a sensitivity is out of range or a manual threshold is not finite; as a training or
            validation starts, or at the latest as it ends, if there are too few good validation images.

    Example:
        >>> from anomalib.models import Patchcore
        >>> from anomalib_fractalad import FalseAlarmThreshold
        >>> model = Patchcore(post_processor=FalseAlarmThreshold(false_alarms=0.02))  # doctest: +SKIP
    """

    calibration: dict[str, Any] | None = None

    def __init__(
        self,
        false_alarms: float = 0.01,
        pixel_false_alarms: float = 0.001,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        for name, rate in (("false_alarms", false_alarms), ("pixel_false_alarms", pixel_false_alarms)):
            if not 0 < rate < 1:
                msg = f"{name} is {rate}; it must be above 0 and below 1 (0.01 lets one in a hundred raise an alarm)"
                raise ValueError(msg)
        for name, threshold in (("image_threshold", image_threshold), ("pixel_threshold", pixel_threshold)):
            if threshold is not None and not math.isfinite(threshold):
                msg = f"{name} is {threshold}; it must be a raw score, or left out for calibration"
                raise ValueError(msg)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        self.false_alarms = false_alarms
        self.pixel_false_alarms = pixel_false_alarms
        self.manual_image_threshold = image_threshold
        self.manual_pixel_threshold = pixel_threshold
        self._good_scores: CatMetric | None = None  # there during a validation alone
        self._good_pixels: GoodPixelThreshold | None = None
        self._set_manual_thresholds()

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        own = ("false_alarms", "pixel_false_alarms", "manual_image_threshold", "manual_pixel_threshold", "calibration")
        return (*(key for key in super()._checkpoint_config_keys if key != "pixel_false_positive_rate"), *own)

    def _set_manual_thresholds(self) -> None:
        if self.manual_image_threshold is not None:
            self._image_threshold.fill_(self.manual_image_threshold)
        if self.manual_pixel_threshold is not None:
            self._pixel_threshold.fill_(self.manual_pixel_threshold)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a validation with too few good images for the promise, before anything is lost.

        Raises:
            ValueError: If that is so, or there are no validation images at all.
        """
        super().setup(trainer, pl_module, stage)
        self._set_manual_thresholds()
        if stage not in {"fit", "validate"} or not self._is_calibrated or trainer.limit_val_batches != 1.0:
            return
        data = getattr(getattr(trainer, "datamodule", None), "val_data", None)
        if isinstance(data, AnomalibDataset) and "label_index" in data.samples:
            self._rank(int((data.samples["label_index"] == 0).sum()))

    @property
    def _is_calibrated(self) -> bool:
        return self.enable_thresholding and self.manual_image_threshold is None

    def _rank(self, count: int) -> int:
        rank = conformal_rank(count, self.false_alarms)
        if rank <= count:
            return rank
        possible = f"the smallest rate possible with them is {smallest_rate(count):.4g}" if count else "none will do"
        msg = (
            f"false_alarms is {self.false_alarms:g}, and validation has {count} good image(s): {possible}. Give at "
            f"least {images_needed(self.false_alarms)} good validation images, or allow more false alarms."
        )
        raise ValueError(msg)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a validation that was interrupted has left behind."""
        super().on_validation_start(trainer, pl_module)
        self._good_scores = self._good_pixels = None

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Batch[Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Collect the scores and pixels of good images, and the range of all.

        Args:
            trainer: The trainer.
            pl_module: The model.
            outputs: Predictions and labels of a batch.
            *args: Unused.
            **kwargs: Unused.
        """
        del trainer, args, kwargs
        if self.enable_normalization:
            self._image_min_max_metric.update(outputs)
            self._pixel_min_max_metric.update(outputs)
        if not self.enable_thresholding:
            return
        if self._good_scores is None:
            device = self.pixel_min.device
            self._good_scores = CatMetric(nan_strategy="error").to(device)
            self._good_pixels = GoodPixelThreshold(self.pixel_false_alarms).to(device)
        maps, scores, labels = outputs.anomaly_map, outputs.pred_score, outputs.gt_label
        if scores is None and maps is not None:
            scores = maps.amax((-2, -1))
        if labels is None or scores is None:
            return
        # Bad images count as minus infinity: torchmetrics cannot gather from a process that has nothing.
        good = scores.detach().flatten().float().where(labels.flatten() == 0, -torch.inf)
        self._good_scores.update(good)
        if maps is not None and self._good_pixels is not None:
            self._good_pixels.update(scored_pixels(pl_module, maps), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and normalization.

        Raises:
            ValueError: If there are too few good images.
        """
        scores, pixels = self._good_scores, self._good_pixels
        self._good_scores = self._good_pixels = None
        super().on_validation_epoch_end(trainer, pl_module)
        if scores is None or pixels is None:
            return
        # What Lightning tries out before a training has too few images.
        is_trial = getattr(trainer, "sanity_checking", False) or getattr(trainer, "fast_dev_run", False)
        self.calibration = None
        if self._is_calibrated and not is_trial:
            self._calibrate_images(scores.compute() if scores.update_called else torch.empty(0))
        if self.manual_pixel_threshold is None and not is_trial:
            self._calibrate_pixels(pixels)

    def _calibrate_images(self, scores: Tensor | list[Tensor]) -> None:
        scores = torch.as_tensor(scores).flatten()
        scores = scores[scores != -torch.inf]
        count = len(scores)
        rank = self._rank(count)
        threshold = scores.sort().values[rank - 1]
        self._image_threshold.copy_(threshold)
        self.calibration = {
            "images": count,
            "false_alarms": self.false_alarms,
            "rank": rank,
            "threshold": float(threshold),
            "expected_rate": (count + 1 - rank) / (count + 1),
            "confidence": CONFIDENCE,
            "upper_bound": upper_bound(count, rank),
        }

    def _calibrate_pixels(self, pixels: GoodPixelThreshold) -> None:
        threshold, count = pixels.compute()
        if not count:
            return
        if threshold.isnan():
            msg = (
                f"pixel_false_alarms is {self.pixel_false_alarms:g}, and the good validation images have {count} "
                f"pixels: the smallest rate possible with them is {smallest_rate(count):.4g}."
            )
            raise ValueError(msg)
        self._pixel_threshold.copy_(threshold)
        if self.calibration is not None:
            found = {"pixels": count, "pixel_false_alarms": self.pixel_false_alarms}
            self.calibration |= found | {"pixel_threshold": float(threshold)}

    def _warn_without_thresholds(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_calibrated and self._has_thresholds and self.calibration is None:
            self._warn(
                trainer,
                f"The thresholds of {type(pl_module).__name__} are those of another post-processor and promise nothing "
                "about false alarms. Run engine.validate with good images.",
            )
        super()._warn_without_thresholds(trainer, pl_module)

    def report(self) -> str:
        """Tell in a sentence what the threshold promises, and on what grounds."""
        if self.manual_image_threshold is not None:
            return f"The image threshold is {self.manual_image_threshold:.6g}, set by hand: nothing is promised."
        if self.calibration is None:
            return "There is no threshold yet: it takes a validation with good images."
        return (
            "Of good images, at most {false_alarms:.3g} raise an alarm on average ({expected_rate:.3g} expected), and "
            "with {confidence:.0%} confidence at most {upper_bound:.3g}: the threshold is {threshold:.6g}, calibrated "
            "on {images} good image(s)."
        ).format(**self.calibration)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what the threshold promises."""
        super().on_fit_end(trainer, pl_module)
        if self.enable_thresholding and self._has_thresholds:
            rank_zero_info(self.report())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what the threshold promises, where this is no part of a training."""
        del pl_module
        if self.enable_thresholding and trainer.state.fn == "validate":
            rank_zero_info(self.report())
