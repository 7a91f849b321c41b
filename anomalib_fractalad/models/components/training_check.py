# SPDX-License-Identifier: Apache-2.0
"""Whether a network has been trained at all, where its predictions are asked for."""

import logging
from typing import TYPE_CHECKING

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from anomalib_fractalad.export.module import ExportModule

from .backbone import FrozenTeacher

# Mixed in before ExportModule, not derived from it.
if TYPE_CHECKING:
    _Base = ExportModule
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

    def before_export(self, input_size: tuple[int, int] | None = None) -> None:
        """Warn if the network is untrained."""
        super().before_export(input_size)
        self._warn_if_untrained("exported")

    def is_untrained(self) -> bool:
        """Whether the network never took a training step."""
        return is_untrained(self.model)

    @rank_zero_only
    def _warn_if_untrained(self, use: str) -> None:
        if self.is_untrained():
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
