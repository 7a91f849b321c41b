# SPDX-License-Identifier: Apache-2.0
"""Stopping a training before a loss that is no number spoils its weights."""

from typing import TYPE_CHECKING, Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, stack

if TYPE_CHECKING:
    from collections.abc import Mapping


class FiniteLoss(Callback):
    """Stops training at a loss that is infinite or not a number, before its gradients reach the weights.

    A module may keep the parts of its loss, scalars by name, in ``loss_parts``; then the part is named.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, for its files."""
        del trainer, pl_module, batch_idx
        self._batch = batch

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Forget the batch."""
        del args, kwargs
        self._batch = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            FloatingPointError: If it is no finite number, or a part of it.
        """
        kept: Mapping[str, Tensor] = getattr(pl_module, "loss_parts", {})
        parts = {**kept, "total": loss.detach()}
        if stack([part.detach().float() for part in parts.values()]).isfinite().all():
            return
        part, value = next((name, value) for name, value in parts.items() if not value.isfinite())
        files = ", ".join(map(str, getattr(self._batch, "image_path", None) or ["(no paths given)"]))
        full = str(trainer.precision).startswith("32")
        msg = (
            f"the {part} loss of {type(pl_module).__name__} is {value.item()} in epoch {trainer.current_epoch}, step "
            f"{trainer.global_step}, on the images {files}. If these are in order, lower the learning rate"
            f"{'' if full else ' or train with --trainer.precision 32'}, and go on from the last checkpoint."
        )
        raise FloatingPointError(msg)
