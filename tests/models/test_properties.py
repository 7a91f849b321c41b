# SPDX-License-Identifier: Apache-2.0
"""Properties of patches and losses, for any shape, memory layout, precision and extreme value."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from anomalib_fractalad.models.aand.loss import (
    AmplificationLoss,
    GateLoss,
    HardDistillationLoss,
    PlainDistillationLoss,
)
from anomalib_fractalad.models.adps.loss import AsymmetricDistillationLoss, FocalLoss
from anomalib_fractalad.models.adps.student import from_patches, to_patches
from anomalib_fractalad.models.fractalad.loss import DistillationLoss, SegmentationLoss

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
EXTREMES = [0.0, 1e-30, 1e-3, 1.0, 1e3, 6e4]


@st.composite
def feature_maps(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """Teacher's and student's features: small, huge, all the same, equal to each other, or of alternating sign."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dtype, batch = draw(DTYPES), draw(st.integers(1, 3))
    pair: tuple[list[Tensor], list[Tensor]] = ([], [])
    for stage in range(draw(st.integers(1, 3))):
        shape = (batch, draw(st.integers(1, 5)), 8 >> stage, draw(st.integers(1, 6)))
        for side in pair:
            values = torch.randn(shape) if draw(st.booleans()) else torch.ones(shape)
            values = in_range(values * draw(st.sampled_from(EXTREMES)), dtype)
            if draw(st.booleans()):
                values = values.contiguous(memory_format=torch.channels_last)
            side.append(values.requires_grad_())
    return pair


def in_range(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = min(torch.finfo(dtype).max, 1e6)
    return values.clamp(-limit, limit).to(dtype)


@st.composite
def logits_and_mask(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 3)), 1, draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    logits = in_range(torch.randn(shape) * draw(st.sampled_from(EXTREMES)), draw(DTYPES)).requires_grad_()
    return logits, (torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))).float()


def assert_finite(loss: Tensor, *inputs: Tensor) -> None:
    assert loss.shape == ()
    assert loss.dtype in {torch.float32, torch.float64}
    assert loss.isfinite()
    for values, gradient in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True):
        # The cosine's gradient at the zero vector, 1e8, is beyond float16; a gradient scaler leaves such a step out.
        assert gradient is None or values.dtype == torch.float16 or gradient.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8]),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.sampled_from([torch.contiguous_format, torch.channels_last]),
    st.booleans(),
    DTYPES,
)
def test_patches_come_back_in_their_places(
    grid: int,
    shape: tuple[int, int, int, int],
    layout: torch.memory_format,
    flipped: bool,
    dtype: torch.dtype,
) -> None:
    batch, channels, height, width = shape
    images = torch.randn(batch, channels, grid * height, grid * width).to(dtype).contiguous(memory_format=layout)
    images = images.transpose(2, 3) if flipped else images
    patches = to_patches(images, grid)
    assert patches.shape[0] == batch * grid**2
    assert patches.dtype == dtype
    assert torch.equal(from_patches(patches, grid), images)


@settings(max_examples=60, deadline=None)
@given(feature_maps())
@pytest.mark.parametrize(
    ("loss", "most"),
    [(DistillationLoss(), 2), (PlainDistillationLoss(), 2), (HardDistillationLoss(), 4)],
)
def test_distillation_losses_are_numbers_in_their_range(
    loss: Any,
    most: int,
    pair: tuple[list[Tensor], list[Tensor]],
) -> None:
    teacher, student = pair
    value = loss([features.detach() for features in teacher], student)
    assert_finite(value, *student)
    assert -1e-4 <= value <= (most + 1e-4) * len(teacher)


@settings(max_examples=60, deadline=None)
@given(logits_and_mask())
def test_segmentation_losses_are_numbers(pair: tuple[Tensor, Tensor]) -> None:
    logits, mask = pair
    losses = SegmentationLoss()(logits, mask)
    for part in losses.values():
        assert_finite(part, logits)
        assert part >= 0
    assert losses["dice"] <= 1


@settings(max_examples=60, deadline=None)
@given(logits_and_mask())
def test_focal_losses_are_numbers(pair: tuple[Tensor, Tensor]) -> None:
    logits, mask = pair
    assert_finite(FocalLoss()(torch.cat([-logits, logits], dim=1), mask), logits)
    assert_finite(GateLoss()(logits, mask.bool()), logits)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 3))
def test_asymmetric_distillation_is_a_number(seed: int, share: float, stages: int) -> None:
    torch.manual_seed(seed)
    distances = [(2 * torch.rand(2, 1, 8 >> stage, 8 >> stage)).requires_grad_() for stage in range(stages)]
    mask = (torch.rand(2, 1, 16, 16) < share).float()
    assert_finite(AsymmetricDistillationLoss()(distances, mask), *distances)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.integers(0, 6), st.integers(0, 6), st.sampled_from(EXTREMES), DTYPES)
def test_amplification_is_a_number_for_any_number_of_positions(
    seed: int,
    normal_count: int,
    anomalous_count: int,
    scale: float,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    normal = in_range(scale * torch.randn(normal_count, 5), dtype)
    anomalous = in_range(scale * torch.randn(anomalous_count, 5), dtype)
    amplified = in_range(scale * torch.randn(anomalous_count, 5), dtype).requires_grad_()
    assert_finite(AmplificationLoss()(normal, anomalous, amplified), amplified)
