# SPDX-License-Identifier: Apache-2.0
"""Anomalib's visualizer, on images as they are read for the model."""

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
        if not acts(DRAWN_IMAGES):
            return super().visualize(predictions)
        with drawn_as_read():
            return super().visualize(predictions)
