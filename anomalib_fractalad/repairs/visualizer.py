# SPDX-License-Identifier: Apache-2.0
"""Anomalib's visualizer, on images as they are read for the model."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from anomalib.visualization import ImageVisualizer

from .base import acts
from .drawn_images import DRAWN_IMAGES, drawn_as_read


class RepairedImageVisualizer(ImageVisualizer):
    """Draws heat maps on gray images of more than 8 bits as on those of 8 bits."""

    def visualize(self, predictions: Any) -> Any:
        """Draw predictions.

        Args:
            predictions: As for :meth:`anomalib.visualization.ImageVisualizer.visualize`.

        Returns:
            As there.
        """
        with _as_read():
            return super().visualize(predictions)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Draw a batch of a test or a prediction.

        Args:
            *args: As for Lightning's callbacks.
            **kwargs: Likewise.
        """
        with _as_read():
            super().on_test_batch_end(*args, **kwargs)


def _as_read() -> AbstractContextManager[None]:
    return drawn_as_read() if acts(DRAWN_IMAGES) else nullcontext()
