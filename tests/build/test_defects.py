# SPDX-License-Identifier: Apache-2.0
"""Synthetic defects: what they change, and where they say that they did."""

import random

import pytest
import torch
from torch import Tensor

from anomalib_fractalad.build import DEFECTS


@pytest.fixture(params=[(256, 256), (96, 64)])
def image(request: pytest.FixtureRequest) -> Tensor:
    """Stripes and noise."""
    height, width = request.param
    stripes = 0.5 + 0.2 * torch.sin(torch.arange(width) / 2).expand(3, height, width)
    return (stripes + 0.03 * torch.randn(3, height, width)).clamp(0, 1)


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_lies_in_its_mask(kind: str, image: Tensor) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    defective, mask = DEFECTS[kind](image, seed=3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert defective.shape == image.shape
    assert 0 <= defective.min() < defective.max() <= 1
    assert mask.shape == (1, *image.shape[-2:])
    assert mask.dtype == torch.bool
    assert 0 < mask.sum() < 0.7 * mask.numel()
    change = (defective - image).abs().amax(dim=0, keepdim=True)
    assert change[mask].mean() > 3 * change[~mask].mean()

    again, same_mask = DEFECTS[kind](image, seed=3)
    assert torch.equal(again, defective)
    assert torch.equal(same_mask, mask)
    other, _ = DEFECTS[kind](image, seed=4)
    assert not torch.equal(other, defective)

    faint, faint_mask = DEFECTS[kind](image, severity=0.25, seed=3)
    torch.testing.assert_close(faint - image, 0.25 * (defective - image), atol=1e-6, rtol=0)
    assert torch.equal(faint_mask, mask)


@pytest.mark.parametrize(
    ("image", "severity", "message"),
    [
        (torch.zeros(1, 3, 64, 64), 1.0, r"shape \(1, 3, 64, 64\); it must be \(3, H, W\), at least 64"),
        (torch.zeros(3, 63, 64), 1.0, "at least 64 pixels a side"),
        (torch.full((3, 64, 64), 2.0), 1.0, "values from 2.0 to 2.0"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), 1.0, "must be floats"),
        (torch.zeros(3, 64, 64), 0.0, "severity is 0.0; it must be above 0 and at most 1"),
        (torch.zeros(3, 64, 64), float("nan"), "severity is nan"),
    ],
)
def test_mistakes(image: Tensor, severity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEFECTS["bright"](image, severity)
