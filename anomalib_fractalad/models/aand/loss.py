# SPDX-License-Identifier: Apache-2.0
"""Losses of AAND."""

from collections.abc import Sequence

import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import sigmoid_focal_loss

from anomalib_fractalad.models.components import at_least_float32, cosine_distance


class GateLoss(nn.Module):
    """Focal loss of a gate: alpha 0.8 on anomalous positions, 0.2 on normal ones, exponent 2."""

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compare a gate with the true mask.

        Args:
            logits: (B, 1, H, W).
            mask: (B, 1, H, W), true or false.

        Returns:
            The mean over positions.
        """
        logits = at_least_float32(logits)
        loss: Tensor = sigmoid_focal_loss(logits, mask.to(logits.dtype), alpha=0.8, gamma=2, reduction="mean")
        return loss


class AmplificationLoss(nn.Module):
    """Push anomalous positions away from normal ones, by at least 0.3 more than the plain features are.

    The mean over pairs of a normal position n and an anomalous position a of
    relu(cos(F_n, FA_a) - (cos(F_n, F_a) - margin)), F plain and FA advanced. Gradients reach FA alone.

    All pairs are one matrix product, n (A_a - a)^T of unit vectors. For 5000 normal and 1000 anomalous positions it
    takes 20 MB in float32, which are kept until the backward pass, and as much again during it.

    Args:
        margin: How much the cosine has to fall.
    """

    def __init__(self, margin: float = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, normal: Tensor, anomalous: Tensor, amplified: Tensor) -> Tensor:
        """Compare features of normal and anomalous positions.

        Args:
            normal: Plain features of normal positions, (N, C).
            anomalous: Plain features of anomalous positions, (A, C).
            amplified: Advanced features of the same anomalous positions, (A, C).

        Returns:
            A scalar in [0, 2 + margin]; 0 if there are no pairs.
        """
        if len(normal) == 0 or len(anomalous) == 0:
            return at_least_float32(amplified).sum() * 0
        with torch.autocast(normal.device.type, enabled=False):
            normal, anomalous, amplified = (
                F.normalize(at_least_float32(features), dim=1) for features in (normal, anomalous, amplified)
            )
            return (normal @ (amplified - anomalous).T).add_(self.margin).relu_().mean()


class HardDistillationLoss(nn.Module):
    """Reverse distillation's loss and, at each level, the mean 1 - cos of the positions that are worst reproduced.

    Args:
        positions: Number of the worst positions of each image.
    """

    def __init__(self, positions: int = 10) -> None:
        super().__init__()
        self.positions = positions
        self.plain = PlainDistillationLoss()

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """Compare features of normal images.

        Args:
            teacher: (B, C_i, H_i, W_i) for each level.
            student: The same shapes.

        Returns:
            A scalar in [0, 4 x levels].
        """
        loss: Tensor = self.plain(teacher, student)
        for t, s in zip(teacher, student, strict=True):
            distance = cosine_distance(t, s).flatten(1)
            loss = loss + distance.topk(min(self.positions, distance.shape[1]), dim=1).values.mean()
        return loss


class PlainDistillationLoss(nn.Module):
    """Reverse distillation's loss: the sum over levels of the mean 1 - cos of the flattened maps."""

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """Compare features of normal images.

        Args:
            teacher: (B, C_i, H_i, W_i) for each level.
            student: The same shapes.

        Returns:
            A scalar in [0, 2 x levels].
        """
        # anomalib's views each map as (B, C H W).
        teacher, student = ([at_least_float32(m).contiguous() for m in maps] for maps in (teacher, student))
        return ReverseDistillationLoss.forward(teacher, student)
