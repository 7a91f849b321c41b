# SPDX-License-Identifier: Apache-2.0
"""A strictly rising map of scores into [0, 1]."""

import torch
from torch import Tensor

# Near 0, floating point tells far more values apart than near 1.
LOWEST = 2**-40  # what the lowest score of validation becomes
HIGHEST = 1 - 2**-4  # and the highest

# The least length of the segments below and above the threshold, relative to the range of validation.
LEAST_BELOW = 2**-10
LEAST_ABOVE = 2**-4

NEXT_TO_NOTHING = 1e-30


def normalize(scores: Tensor, low: Tensor, high: Tensor, threshold: Tensor) -> Tensor:
    """Map scores into [0, 1], strictly rising and continuous, with the threshold at 0.5.

    Scores from ``low`` to the threshold rise linearly from `LOWEST` to 0.5, those from the threshold to ``high``
    linearly to `HIGHEST`. Beyond ``low`` and ``high``, scores go on as hyperbolas that approach 0 and 1. Where the
    threshold is ``low`` or ``high`` (or beyond it), its hyperbola starts at 0.5; a segment that is shorter than
    `LEAST_BELOW` or `LEAST_ABOVE` of the range ends proportionally nearer to 0.5, so that it is not steeper.

    Scores next to ``low`` keep their relative precision: probabilities of 1e-9 and 2e-9 stay apart.

    Args:
        scores: Raw scores or anomaly maps, of any shape.
        low: Lowest raw score of validation, a scalar.
        high: Highest raw score of validation, a scalar.
        threshold: Raw threshold, a scalar.

    Returns:
        Normalized scores of the same shape, in float32 (or float64 where the scores are).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    low, high, threshold = (scalar.to(scores.dtype) for scalar in (low, high, threshold))
    one = torch.ones_like(threshold)
    low = torch.where(threshold - low > NEXT_TO_NOTHING, low, threshold)
    high = torch.where(high - threshold > NEXT_TO_NOTHING, high, threshold)
    below, above, span = threshold - low, high - threshold, high - low
    constant = torch.where(threshold.abs() > NEXT_TO_NOTHING, threshold.abs(), one)
    span = torch.where(span > 0, span, constant)
    drop = 0.5 * (below / (LEAST_BELOW * span)).clamp(max=1.0)
    rise = (HIGHEST - 0.5) * (above / (LEAST_ABOVE * span)).clamp(max=1.0)
    below, above = (torch.where(length > 0, length, one) for length in (below, above))
    # Of scores that are positive by nature, those below the lowest lie within it.
    scale = torch.where((low > NEXT_TO_NOTHING) & (low < span), low, span)

    # At the threshold, the quotient is exactly 1: a product with the reciprocal would miss 0.5.
    segments = drop * ((torch.minimum(scores, threshold) - low).relu() / below)
    segments = segments + rise * (torch.minimum((scores - threshold).relu(), above) / above)
    lower_tail = (0.5 - drop).clamp(min=LOWEST) * (scale / (scale + (low - scores).relu()))
    beyond = (scores - high).clamp(min=0.0, max=1 / NEXT_TO_NOTHING)  # infinity would become NaN
    return segments + lower_tail + (0.5 - rise) * (beyond / (span + beyond))
