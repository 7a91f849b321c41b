# SPDX-License-Identifier: Apache-2.0
"""Losses of ADPS."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import sigmoid_focal_loss

from anomalib_fractalad.models.components import at_least_float32


class AsymmetricDistillationLoss(nn.Module):
    """Pulls normal positions together and pushes anomalous ones apart.

    Sum over levels of the mean over positions of (1 - Y)(1 - cos) + Y cos. The mask Y of a level is the share of
    anomalous pixels that each of its positions covers.
    """

    def forward(self, distances: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Compare the distances of teacher and student with the anomaly mask.

        Args:
            distances: 1 - cos(teacher, student), (B, 1, H_i, W_i) for each level.
            mask: (B, 1, H, W), values in [0, 1].

        Returns:
            A scalar in [-levels, 2 x levels].
        """
        loss = mask.new_zeros(())
        for distance in distances:
            share = F.interpolate(mask.to(distance.dtype), size=distance.shape[-2:], mode="area")
            loss = loss + ((1 - share) * distance + share * (1 - distance)).mean()
        return loss


class FocalLoss(nn.Module):
    """-(1 - p)^2 log(p), p the softmax probability of the true one of two classes, mean over pixels.

    Lin et al., ICCV 2017, without class weights.
    """

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compare a segmentation with the true mask.

        Args:
            logits: (B, 2, H, W), normal and anomalous.
            mask: (B, 1, H, W), values 0 and 1.

        Returns:
            A scalar, at least 0.
        """
        normal, anomalous = at_least_float32(logits).chunk(2, dim=1)
        # The softmax of two logits is the sigmoid of their difference.
        difference = anomalous - normal
        loss: Tensor = sigmoid_focal_loss(difference, mask.to(difference.dtype), alpha=-1, gamma=2, reduction="mean")
        return loss
