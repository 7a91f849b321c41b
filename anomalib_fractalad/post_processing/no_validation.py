# SPDX-License-Identifier: Apache-2.0
"""What to say where there is no validation, and so no thresholds."""

from anomalib.data import AnomalibDataModule
from lightning.pytorch import LightningModule, Trainer


def check_data(trainer: Trainer) -> None:
    """Refuse a data module that has no validation images where a validation is due.

    Args:
        trainer: The trainer, after its data module was set up.

    Raises:
        ValueError: If that is so.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, AnomalibDataModule) or trainer.limit_val_batches == 0:
        return
    if type(data).val_dataloader is AnomalibDataModule.val_dataloader and not hasattr(data, "val_data"):
        msg = (
            f"{data.name} has no validation images (its val_split_mode is {data.val_split_mode.value!r}), so no "
            "thresholds can be found. Choose the val_split_mode 'from_test', 'same_as_test', 'from_train' or "
            "'synthetic'. To train without thresholds, set the trainer's limit_val_batches to 0."
        )
        raise ValueError(msg)


def why_never(trainer: Trainer) -> str | None:
    """Why a training that starts will have no validation.

    Args:
        trainer: The trainer, as training starts.

    Returns:
        The cause and how to mend it, or nothing if there will be a validation as far as can be known.
    """
    if trainer.limit_val_batches == 0:
        return "limit_val_batches is 0"
    if not trainer.enable_validation:
        return "training was given no validation images (val_dataloaders or a datamodule)"
    interval, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if interval is not None and epochs is not None and 0 <= epochs < interval:
        return f"check_val_every_n_epoch is {interval}, and training has {epochs} epoch(s)"
    return None


def message(model: LightningModule, cause: str, *, has_thresholds: bool = False) -> str:
    """Say what follows from a missing validation and how to mend it.

    Args:
        model: The model.
        cause: Why there is no validation.
        has_thresholds: Whether thresholds of an earlier validation are there.

    Returns:
        The message.
    """
    name = type(model).__name__
    if has_thresholds:
        return (
            f"{name} is not validated, because {cause}: it keeps the thresholds and the normalization of an earlier "
            "validation, which do not fit what it learns now. Run engine.validate afterwards."
        )
    return (
        f"{name} has no thresholds, because {cause}: scores and anomaly maps are raw, and there are no labels, masks "
        "and F1 scores. Run engine.validate with validation images, or let training validate."
    )
