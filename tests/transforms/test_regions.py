# SPDX-License-Identifier: Apache-2.0
"""Anomalies in random regions."""

import pytest
import torch
from kornia.filters import box_blur

from anomalib_fractalad import transforms
from anomalib_fractalad.transforms import (
    LightingJitter,
    MixedAnomalyGenerator,
    RegionAnomalyGenerator,
    WarpAnomalyGenerator,
)
from anomalib_fractalad.transforms.foreground import foreground_mask
from anomalib_fractalad.transforms.regions import _blur, visible_change

KINDS = ["CutPaste", "Erase", "Recolor", "Scratch", "Swirl", "Warp"]


@pytest.fixture
def images() -> torch.Tensor:
    """A bright, textured disc on a plain background, a little different in each image."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = torch.hypot(y - 32, x - 32) < 18
    texture = 0.6 + 0.3 * torch.rand(6, 3, 64, 64)
    return torch.where(disc, texture, torch.full_like(texture, 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_change_what_the_mask_says_and_nothing_far_from_it(kind: str, images: torch.Tensor) -> None:
    generator: RegionAnomalyGenerator = getattr(transforms, f"{kind}AnomalyGenerator")()
    before = images.clone()
    parameters = generator.generate_parameters(images)
    state = torch.get_rng_state()
    anomalous, mask = generator.apply(images, parameters)
    assert torch.equal(torch.get_rng_state(), state)
    again, _ = generator.apply(images, parameters)
    assert torch.equal(again, anomalous)
    assert torch.equal(images, before)

    assert anomalous.shape == images.shape
    assert mask.shape == (6, 1, 64, 64)
    assert anomalous.min() >= 0
    assert anomalous.max() <= 1
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask.flatten(1).amax(1) > 0).sum() >= 4  # in a few the change may be too faint to see
    difference = (anomalous - images).abs().mean(1, keepdim=True)
    assert difference[mask == 0].max() < 9 * 0.02
    assert difference[mask > 0].mean() > 0.02
    other, _ = generator(images)
    assert not torch.equal(other, anomalous)
    # Regions lie on the foreground.
    rows, columns = parameters["center"].long().T
    assert foreground_mask(images)[torch.arange(6), 0, rows, columns].float().mean() > 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_do_not_depend_on_what_the_device_holds(kind: str) -> None:
    # Tensors of this device hold no values: whatever reads one, as a wait for an accelerator does, raises.
    images = torch.rand(2, 3, 48, 64, device="meta")
    anomalous, mask = getattr(transforms, f"{kind}AnomalyGenerator")()(images)
    assert (anomalous.shape, mask.shape) == ((2, 3, 48, 64), (2, 1, 48, 64))


def test_a_region_is_where_it_was_drawn() -> None:
    images = torch.rand(1, 3, 64, 64)
    generator = WarpAnomalyGenerator()
    parameters = generator.generate_parameters(images)
    parameters |= {
        "center": torch.tensor([[20.0, 40.0]]),
        "axes": torch.tensor([[4.0, 10.0]]),
        "angle": torch.zeros(1),
        "box": torch.tensor([True]),
        "outline": torch.zeros(1, 1, 9, 9),
        "softness": torch.tensor([0.1]),
    }
    region = generator.region(images, parameters)[0, 0]
    inside = region > 0.5
    rows, columns = inside.nonzero().T
    assert (int(rows.min()), int(rows.max())) == pytest.approx((10, 30), abs=1)
    assert (int(columns.min()), int(columns.max())) == pytest.approx((36, 44), abs=1)


def test_foreground() -> None:
    plain = torch.full((1, 3, 64, 64), 0.2)
    assert foreground_mask(plain).all()  # nothing stands out
    plain[..., 20:40, 24:44] = 0.9
    mask = foreground_mask(plain)
    assert mask[..., 20:40, 24:44].all()
    assert mask.float().mean() < 0.25
    assert foreground_mask(torch.rand(1, 3, 64, 64)).all()  # the border is not plain


def test_visible_change() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    changed = images.clone()
    changed[..., 4:8, 4:8] = 0.8
    changed[..., 12:, 12:] = 0.51  # too faint
    mask = visible_change(images, changed)[0, 0]
    assert mask[4:8, 4:8].all()
    assert not mask[10:, 10:].any()


def test_a_mixture_uses_each_of_its_generators(images: torch.Tensor) -> None:
    generator = MixedAnomalyGenerator()
    used = set()
    for part in generator.generators:
        part.register_forward_pre_hook(lambda module, _: used.add(type(module).__name__))
    for _ in range(8):
        anomalous, mask = generator(images)
        assert anomalous.shape == images.shape
        assert mask.shape == (6, 1, 64, 64)
        assert torch.equal(visible_change(images, anomalous), mask)
    assert len(used) == 6
    with pytest.raises(ValueError, match="generators is empty"):
        MixedAnomalyGenerator([])


@pytest.mark.parametrize("arguments", [{"size": (0.5, 0.1)}, {"size": (0.1, 1.5)}, {"opacity": (0.0, 1.0)}])
def test_ranges_are_checked(arguments: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        WarpAnomalyGenerator(**arguments)


def test_lighting_changes_whole_images(images: torch.Tensor) -> None:
    torch.testing.assert_close(LightingJitter(0)(images), images)
    jitter = LightingJitter()
    parameters = jitter.generate_parameters(images)
    changed = jitter.apply(images, parameters)
    assert torch.equal(jitter.apply(images, parameters), changed)
    assert changed.min() >= 0
    assert changed.max() <= 1
    background = (changed - images)[..., :8, :8].mean((1, 2, 3)).abs()
    assert background.min() > 1e-4
    assert background.max() < 0.25
    still = {**parameters, "noise": torch.zeros_like(parameters["noise"])}
    flat = jitter.apply(images, still)[..., :8, :8]
    assert torch.allclose(flat, flat[..., :1, :1].expand_as(flat))
    assert not LightingJitter(noise=0).generate_parameters(images)["noise"].any()
    with pytest.raises(ValueError, match="strength=-1"):
        LightingJitter(-1)
    with pytest.raises(ValueError, match="noise=-1"):
        LightingJitter(noise=-1)


@pytest.mark.parametrize("side", [9, 41])
@pytest.mark.parametrize("size", [(64, 96), (30, 17)])
def test_the_blur_is_two_box_filters(size: tuple[int, int], side: int) -> None:
    images = torch.rand(2, 3, *size)
    fits = min(side, *size)
    fits -= 1 - fits % 2
    expected = box_blur(box_blur(images, fits), fits)
    torch.testing.assert_close(_blur(images, side), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = _blur(images, side)
    assert rounded.dtype == images.dtype
    torch.testing.assert_close(rounded, expected, atol=0.01, rtol=0)
