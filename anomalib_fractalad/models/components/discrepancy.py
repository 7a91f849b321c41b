# SPDX-License-Identifier: Apache-2.0
"""How far a student's features are from its teacher's."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision to float32, where sums and norms of it would overflow or lose digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cosine_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - cosine similarity over channels.

    Args:
        teacher: (B, C, H, W).
        student: (B, C, H, W).

    Returns:
        (B, 1, H, W), values in [0, 2], in float32 or wider.
    """
    return 1 - F.cosine_similarity(at_least_float32(teacher), at_least_float32(student), dim=1).unsqueeze(1)
