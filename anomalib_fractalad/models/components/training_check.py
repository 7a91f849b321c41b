# SPDX-License-Identifier: Apache-2.0
"""Whether a network has been trained at all, where its predictions are asked for."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.models.components import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from .backbone import FrozenTeacher

# anomalib lists only the direct subclasses of AnomalibModule, so what they share has to come from beside it.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object

logger = logging.getLogger(__name__)


class TrainingCheck(_Base):
    """Warn where a network that never took a training step is validated, tested, exported or asked for predictions."""

    untrained_because = "it never took a training step. Train it, or give the checkpoint of a training (ckpt_path)"

    def on_validation_start(self) -> None:
        """Warn if the network is untrained, but within a training, where it is about to change."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._warn_if_untrained("validated")

    def on_test_start(self) -> None:
        """Warn if the network is untrained."""
        super().on_test_start()
        self._warn_if_untrained("tested")

    def on_predict_start(self) -> None:
        """Warn if the network is untrained."""
        super().on_predict_start()
        self._warn_if_untrained("asked for predictions")

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export for torch, with a warning if the network is untrained.

        Args:
            *args: As for anomalib's :meth:`to_torch`.
            **kwargs: Likewise.

        Returns:
            The .pt file.
        """
        self._warn_if_untrained("exported")
        file: Path = super().to_torch(*args, **kwargs)
        return file

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]
        """Export to ONNX, and by way of it to OpenVINO, with a warning if the network is untrained.

        Args:
            *args: As for the base's :meth:`to_onnx`.
            **kwargs: Likewise.

        Returns:
            The ONNX file.
        """
        self._warn_if_untrained("exported")
        file: Path = super().to_onnx(*args, **kwargs)
        return file

    @rank_zero_only
    def _warn_if_untrained(self, use: str) -> None:
        if is_untrained(self.model):
            why = self.untrained_because
            logger.warning("%s is %s, but its maps and scores mean nothing: %s.", self.name, use, why)


def is_untrained(network: nn.Module) -> bool:
    """Whether no batch norm of a network, its teacher's aside, has seen a training batch.

    Args:
        network: A network with batch norms in each part that is trained.
    """
    counts = [
        buffer
        for part in network.children()
        if not isinstance(part, FrozenTeacher)
        for name, buffer in part.named_buffers()
        if name.endswith("num_batches_tracked")
    ]
    return bool(counts) and not any(counts)
