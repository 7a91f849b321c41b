# SPDX-License-Identifier: Apache-2.0
"""What a trainer reads its data from: data loaders, or anything else that gives batches."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader


def loaders_of(*collections: Any) -> list[Any]:
    """The single loaders of what a trainer was given.

    Args:
        *collections: Loaders, combined loaders, or nested lists and dictionaries of loaders; ``None`` is passed over.
    """
    found: list[Any] = []
    for collection in collections:
        combined = collection if isinstance(collection, CombinedLoader) else CombinedLoader(collection)
        found.extend(loader for loader in combined.flattened if loader is not None)
    return found


def datasets_of(*collections: Any) -> list[Any]:
    """The data sets of loaders; loaders without one, such as any iterable of batches, are passed over.

    Args:
        *collections: As for :func:`loaders_of`.
    """
    return [loader.dataset for loader in loaders_of(*collections) if getattr(loader, "dataset", None) is not None]


def current_loaders(trainer: Trainer) -> list[Any]:
    """The loaders of what a trainer does now.

    Args:
        trainer: The trainer.
    """
    if trainer.predicting:
        return loaders_of(trainer.predict_dataloaders)
    if trainer.testing:
        return loaders_of(trainer.test_dataloaders)
    if trainer.state.fn == "fit":
        return loaders_of(trainer.train_dataloader, trainer.val_dataloaders)
    return loaders_of(trainer.val_dataloaders)
