# SPDX-License-Identifier: Apache-2.0
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import Tensor

from anomalib_fractalad.transforms.foreground import object_mask, shorter_side


def ellipse(height: int, width: int, axes: tuple[float, float], degrees: float = 0.0) -> Tensor:
    y = torch.arange(height)[:, None] - height / 2
    x = torch.arange(width) - width / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return ((cos * x + sin * y) / axes[0]) ** 2 + ((cos * y - sin * x) / axes[1]) ** 2 < 1


def image_of(mask: Tensor, background: float, foreground: float) -> Tensor:
    image = torch.where(mask, foreground, background).expand(3, -1, -1)
    return (image + 0.03 * torch.randn(mask.shape)).clamp(0, 1)


@pytest.mark.parametrize(("background", "foreground"), [(0.9, 0.3), (0.1, 0.6), (0.52, 0.28), (0.3, 0.37)])
def test_object_is_found_on_bright_and_dark_background(background: float, foreground: float) -> None:
    torch.manual_seed(0)
    expected = ellipse(200, 320, (90, 40), 20)
    mask = object_mask(image_of(expected, background, foreground)[None])[0, 0]
    assert mask.shape == expected.shape
    assert (mask & expected).sum() / (mask | expected).sum() > 0.9


def test_agrees_with_the_8_bit_recipe() -> None:
    torch.manual_seed(0)
    shape = ellipse(256, 256, (100, 50), 30)
    gray = torch.stack([image_of(shape, *levels)[:1] for levels in ((0.8, 0.55), (0.2, 0.26), (0.55, 0.32))])
    gray = (255 * gray).round()
    masks = object_mask(gray / 255)
    for image, mask in zip(gray, masks, strict=True):
        levels = cv2.blur(image[0].byte().numpy(), (5, 5))
        mean = int(levels[:20, :20].mean())
        bright = mean > 128
        threshold, kind = (mean - 50, cv2.THRESH_BINARY_INV) if bright else (mean + 10, cv2.THRESH_BINARY)
        expected = cv2.medianBlur(cv2.threshold(levels, threshold, 255, kind)[1], 5) > 0
        assert 0.05 < expected.mean() < 0.95
        assert (mask[0].numpy() != expected).mean() < 0.002


def test_thresholds_and_filter_are_arguments() -> None:
    torch.manual_seed(0)
    image = image_of(ellipse(128, 128, (40, 20)), 0.8, 0.7)[None]
    assert not object_mask(image).any()
    assert object_mask(image, darker=15).any()
    dark = image_of(ellipse(128, 128, (40, 20)), 0.2, 0.3)[None]
    assert object_mask(dark).any()
    assert not object_mask(dark, brighter=60).any()
    speck = torch.zeros(1, 1, 64, 64)
    speck[..., 40, 40] = 1
    assert not object_mask(speck, size=64, corner=8).any()
    assert object_mask(speck, size=64, corner=8, kernel_size=1).any()


def test_plain_images_have_no_object() -> None:
    assert not object_mask(torch.zeros(1, 3, 50, 70)).any()
    assert not object_mask(torch.ones(2, 1, 50, 70)).any()


@pytest.mark.parametrize("degrees", [0, 17, 45, 73, 90])
@pytest.mark.parametrize("size", [(256, 256), (180, 300)])
def test_shorter_side_agrees_with_opencv(degrees: float, size: tuple[int, int]) -> None:
    canvas = np.zeros(size, dtype=np.uint8)
    box = cv2.boxPoints(((size[1] / 2, size[0] / 2), (120, 41), degrees)).astype(np.int32)
    cv2.fillPoly(canvas, [box], 255)
    cv2.circle(canvas, (12, 12), 8, 255, -1)
    contours, _ = cv2.findContours(canvas, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    expected = min(cv2.minAreaRect(max(contours, key=cv2.contourArea))[1])
    masks = torch.from_numpy(canvas > 0)[None, None]
    assert shorter_side(masks).item() == pytest.approx(expected, abs=0.6)


def test_shorter_side_of_a_batch() -> None:
    masks = torch.zeros(4, 1, 60, 80, dtype=torch.bool)
    masks[0, 0, 10:30, 5:45] = True
    masks[1, 0, 5:15, 5:15] = True
    masks[1, 0, 30:55, 30:70] = True
    masks[2, 0, 7, 9] = True
    torch.testing.assert_close(shorter_side(masks), torch.tensor([19.0, 24.0, 0.0, 0.0]))
    # The rectangle follows the object: an upright one would have sides of more than twice the length.
    tilted = ellipse(60, 80, (30, 5), 45)
    upright = min(tilted.any(0).sum().item(), tilted.any(1).sum().item()) - 1
    assert upright > 2 * shorter_side(tilted[None, None]).item()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.sampled_from([1, 3]),
    height=st.integers(32, 90),
    width=st.integers(32, 90),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    content=st.sampled_from(["black", "white", "noise", "left"]),
)
@example(batch=1, channels=3, height=57, width=56, dtype=torch.bfloat16, content="noise")
def test_any_image_gives_a_mask(
    batch: int,
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    content: str,
) -> None:
    images = torch.zeros(batch, channels, height, width, dtype=dtype)
    if content == "white":
        images += 1
    elif content == "noise":
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    elif content == "left":
        images[..., : width // 2] = 1
    masks = object_mask(images)
    assert masks.shape == (batch, 1, height, width)
    assert masks.dtype == torch.bool
    sides = shorter_side(masks)
    assert sides.isfinite().all()
    assert ((sides >= 0) & (sides <= max(height, width))).all()
    # Views with other strides give the same result.
    flipped = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert torch.equal(object_mask(flipped), masks)
