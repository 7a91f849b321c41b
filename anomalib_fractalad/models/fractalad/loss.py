# SPDX-License-Identifier: Apache-2.0
"""Losses of FractalAD."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import at_least_float32, cosine_distance


class DistillationLoss(nn.Module):
    """Sum over levels of the mean of 1 - cos(teacher, student) over positions."""

    def forward(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
        """Compare features of normal images.

        Args:
            teacher: (B, C_i, H_i, W_i) for each level.
            student: The same shapes.

        Returns:
            A scalar in [0, 2 x levels].
        """
        return sum(cosine_distance(t, s).mean() for t, s in zip(teacher, student, strict=True))  # type: ignore[return-value]


class DiceLoss(nn.Module):
    """1 - (2 sum(p y) + 1) / (sum(p) + sum(y) + 1), p = sigmoid(logits), sums over the whole batch."""

    def forward(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Compare a predicted mask with the true one.

        Args:
            logits: Any shape.
            mask: The same shape, values 0 and 1.

        Returns:
            A scalar in [0, 1).
        """
        probability, mask = at_least_float32(logits).sigmoid(), at_least_float32(mask)
        return 1 - (2 * (probability * mask).sum() + 1) / (probability.sum() + mask.sum() + 1)


class SegmentationLoss(nn.Module):
    """Binary cross entropy (mean over pixels) and Dice loss."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = DiceLoss()

    def forward(self, logits: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Compare a predicted mask with the true one.

        Args:
            logits: (B, 1, H, W).
            mask: (B, 1, H, W), values 0 and 1.

        Returns:
            The parts ``bce`` and ``dice``; the loss is their sum.
        """
        bce = F.binary_cross_entropy_with_logits(at_least_float32(logits), at_least_float32(mask))
        return {"bce": bce, "dice": self.dice(logits, mask)}
