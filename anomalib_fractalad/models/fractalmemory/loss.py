# SPDX-License-Identifier: Apache-2.0
"""Loss of FractalMemory's head."""

from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from anomalib_fractalad.models.components import at_least_float32

FOCAL_WEIGHT = 4.0


class SegmentationLoss(nn.Module):
    """Focal loss (gamma 2) and Dice loss, the latter over the whole batch."""

    def forward(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compare a segmentation with the truth.

        Args:
            logits: (B, 1, H, W).
            mask: Anomalous share of each place, (B, 1, H, W), in [0, 1].

        Returns:
            ``focal`` and ``dice``, scalars in float32 or wider.
        """
        logits, mask = at_least_float32(logits), at_least_float32(mask)
        probability = logits.sigmoid()
        overlap = 2 * (probability * mask).sum() + 1
        return {
            "focal": FOCAL_WEIGHT * sigmoid_focal_loss(logits, mask, alpha=0.5, gamma=2, reduction="mean"),
            "dice": 1 - overlap / (probability.sum() + mask.sum() + 1),
        }
