# SPDX-License-Identifier: Apache-2.0
"""The components that a model has where its user gives none: sizes of images, metrics, thresholds, drawings."""

from typing import TYPE_CHECKING

from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Resize

from anomalib_fractalad.post_processing import OrderPreservingPostProcessor
from anomalib_fractalad.repairs.visualizer import RepairedImageVisualizer

# anomalib lists only the direct subclasses of AnomalibModule, so what models share has to come from beside it.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class DefaultComponents(_Base):
    """Pre-processor, post-processor, evaluator and visualizer of all models."""

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize to (height, width), 256x256 by default, and nothing else: the network normalizes by itself."""
        return PreProcessor(transform=Resize(image_size or (256, 256), antialias=True))

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Image AUROC and F1, and with masks pixel AUROC, F1, AP (AUPR) and AUPRO."""
        image, maps = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
        return Evaluator(
            test_metrics=[
                AUROC(image, "image_"),
                F1Score(["pred_label", "gt_label"], "image_", strict=False),
                AUROC(maps, "pixel_", strict=False),
                F1Score(["pred_mask", "gt_mask"], "pixel_", strict=False),
                *(metric(maps, "pixel_", strict=False) for metric in (AUPR, AUPRO)),
            ]
        )

    def configure_post_processor(self) -> OrderPreservingPostProcessor:
        """Normalization that keeps the order of all values."""
        return OrderPreservingPostProcessor()

    @classmethod
    def configure_visualizer(cls) -> RepairedImageVisualizer:
        """Anomalib's visualizer, which draws gray images of 16 bits as the model reads them."""
        return RepairedImageVisualizer()
