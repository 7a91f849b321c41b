# SPDX-License-Identifier: Apache-2.0
import dataclasses
import inspect
import os
import pickle
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import Draem
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, read_image
from torchvision.transforms.v2 import functional as F  # noqa: N812

from anomalib_fractalad.transforms import FractalAnomalyGenerator
from anomalib_fractalad.transforms.color import jitter
from anomalib_fractalad.transforms.ifs import draw

QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
# Of the published generator on the magnetic tiles at 256 x 256: share of the image, mean absolute change.
MASK_AREA = torch.tensor([0.013, 0.025, 0.053, 0.086, 0.147])
CHANGE = torch.tensor([0.017, 0.037, 0.059, 0.085, 0.151])
# Of the published steps done with PIL and OpenCV, one after the other, 4000 times on `pattern()`.
CHANGE_OF_PATTERN = torch.tensor([0.0518, 0.0773, 0.0985, 0.1331, 0.2156])


def pattern() -> Tensor:
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    level = 0.35 + 0.2 * (x / 10).sin() * (y / 15).cos() + 0.1 * x / 256
    return torch.stack([level + 0.05, level, level - 0.05])


def plain(**options: Any) -> FractalAnomalyGenerator:
    """A generator that pastes without recoloring and noise, unless the options say otherwise."""
    defaults = {"color_probabilities": (1.0, 0.0, 0.0), "slight_jitter": 0.0, "noise_probability": 0.0}
    return FractalAnomalyGenerator(**(defaults | {"points": 2000} | options))


def with_object(count: int, level: float = 0.1) -> Tensor:
    """Images of 96 x 128 with a dark disc of 40 pixels across on a bright background."""
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    disc = (y - 48) ** 2 + (x - 70) ** 2 < 20**2
    return torch.where(disc, level, 0.9).expand(count, 3, -1, -1)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 32, 45), (2, 3, 50, 40), (1, 1, 33, 100), (5, 1, 64, 64)])
def test_contract(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    before = image.clone()
    anomalous, mask = FractalAnomalyGenerator()(image)
    assert torch.equal(image, before)
    assert anomalous.shape == shape
    assert mask.shape == (*shape[:-3], 1, *shape[-2:])
    assert mask.dtype == anomalous.dtype == image.dtype
    assert set(mask.unique().tolist()) == {0.0, 1.0}


def test_never_empty_with_probability_one() -> None:
    generator = FractalAnomalyGenerator(points=100)
    for size in (32, 48):
        masks = generator(torch.rand(500, 1, size, size))[1]
        assert masks.flatten(1).any(1).all()


def test_a_shape_that_the_rotation_hides_leaves_the_center() -> None:
    generator = plain(patch_size=(0.5, 0.5), rotation=(45, 45), dilations=0)
    images = torch.rand(1, 1, 64, 64)
    parameters = generator.generate_parameters(images)
    # Two contractions to points: two opposite corners of the box, which the rotation makes transparent.
    systems = torch.tensor([[[[1e-3, 0, 0], [0, 1e-3, 0]], [[1e-3, 0, 1], [0, 1e-3, 1]]]])
    stamps = torch.zeros(1, 3, 3, dtype=torch.bool)
    stamps[:, 1, 1] = True
    parameters = dataclasses.replace(parameters, systems=systems, stamps=stamps)
    mask = generator.apply(images, parameters)[1]
    assert mask.nonzero()[:, 2:].tolist() == (parameters.target + 16).tolist()


def test_probability() -> None:
    images = torch.rand(300, 1, 32, 32)
    anomalous, masks = FractalAnomalyGenerator(probability=0.3, points=100)(images)
    active = masks.flatten(1).any(1)
    assert 60 < active.sum() < 120
    assert torch.equal(anomalous[~active], images[~active])
    anomalous, masks = FractalAnomalyGenerator(probability=0)(images)
    assert torch.equal(anomalous, images)
    assert not masks.any()


def test_follows_the_seed_and_the_parameters() -> None:
    images = torch.rand(4, 3, 64, 64)
    generator = FractalAnomalyGenerator()
    torch.manual_seed(3)
    first = generator(images)
    torch.manual_seed(3)
    second = generator(images)
    third = generator(images)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[1], third[1])

    parameters = generator.generate_parameters(images)
    kept = {name: value.clone() for name, value in vars(parameters).items()}
    state = torch.get_rng_state()
    first = generator.apply(images, parameters)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(parameters, name), value) for name, value in kept.items())
    assert all(map(torch.equal, first, pickle.loads(pickle.dumps(generator)).apply(images, parameters)))  # noqa: S301


def test_parameters_fit_other_images_of_the_same_shape() -> None:
    generator = plain()
    parameters = generator.generate_parameters(torch.rand(3, 3, 64, 64))
    _, masks = generator.apply(torch.zeros(3, 3, 64, 64), parameters)
    assert torch.equal(masks, generator.apply(torch.ones(3, 3, 64, 64), parameters)[1])


@pytest.mark.parametrize("size", [(64, 64), (60, 100)])
def test_geometry_agrees_with_pil(size: tuple[int, int]) -> None:
    levels = torch.randint(256, (12, 3, *size), dtype=torch.uint8)
    images = levels / 255
    generator = plain()
    parameters = generator.generate_parameters(images)
    points = parameters.side.max().item() ** 2
    shapes = draw(parameters.systems, parameters.side, parameters.stamps, points)
    anomalous, masks = generator.apply(images, parameters)
    for number in range(len(images)):
        side, angle = parameters.side[number].item(), parameters.angle[number].item()
        top, left = parameters.source[number].tolist()
        patch = F.to_pil_image(levels[number, :, top : top + side, left : left + side])
        if parameters.flip[number, 0]:
            patch = patch.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        if parameters.flip[number, 1]:
            patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        patch = F.to_dtype(F.to_image(patch.convert("RGBA").rotate(angle)), torch.float32, scale=True)
        opaque = (patch[3] > 0) & shapes[number, :side, :side]
        top, left = parameters.target[number].tolist()
        expected, shape = images[number].clone(), torch.zeros(1, *size)
        expected[:, top : top + side, left : left + side][:, opaque] = patch[:3, opaque]
        shape[0, top : top + side, left : left + side] = opaque
        # PIL computes in fixed point: a pixel now and then falls to the other side of a boundary.
        assert ((anomalous[number] - expected).abs().amax(0) > 1e-4).sum() <= 3
        assert (masks[number] != max_pool2d(shape[None], 7, 1, 3)[0]).sum() <= 12


def test_without_flip_and_rotation_the_patch_is_copied() -> None:
    images = torch.rand(6, 1, 64, 80)
    generator = plain(flip_probability=0, rotation=(0, 0), dilations=0)
    parameters = generator.generate_parameters(images)
    anomalous, masks = generator.apply(images, parameters)
    for image, changed, mask, source, target in zip(
        images, anomalous, masks, parameters.source, parameters.target, strict=True
    ):
        offset = (target - source).tolist()
        moved = image.roll(offset, dims=(1, 2))
        torch.testing.assert_close(changed, torch.where(mask > 0, moved, image))


def test_flip_probability_one_flips_both_ways() -> None:
    parameters = plain(flip_probability=1).generate_parameters(torch.rand(9, 1, 32, 32))
    assert parameters.flip.all()


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.25])
def test_patches_keep_size_and_margin(margin: float) -> None:
    generator = plain(position_margin=margin, patch_size=(0.2, 0.5))
    parameters = generator.generate_parameters(torch.rand(400, 1, 60, 100))
    side = parameters.side
    assert 12 <= side.min() < 14
    assert 28 < side.max() <= 30
    for corner in (parameters.source, parameters.target):
        assert (corner >= torch.tensor([60, 100]) * margin - 1).all()
        assert (corner + side[:, None] <= torch.tensor([60, 100]) * (1 - margin) + 1).all()
        assert corner.float().std(0).min() > 1


@pytest.mark.parametrize("dilations", [0, 1, 5])
def test_dilations(dilations: int) -> None:
    images = torch.rand(8, 1, 48, 48)
    torch.manual_seed(0)
    plain_masks = plain(dilations=0, position_margin=0)(images)[1]
    torch.manual_seed(0)
    masks = plain(dilations=dilations, position_margin=0)(images)[1]
    assert torch.equal(masks, max_pool2d(plain_masks, 2 * dilations + 1, 1, dilations))


@pytest.mark.parametrize("channels", [1, 3])
def test_channel_gain_wraps_like_8_bit_values(channels: int) -> None:
    images = (255 * torch.rand(6, channels, 64, 64)).round() / 255
    options = {"color_probabilities": (0.0, 0.0, 1.0), "dilations": 0}
    generator, copier = plain(**options), plain(dilations=0)
    parameters = generator.generate_parameters(images)
    wrapped, masks = generator.apply(images, parameters)
    clipped, _ = plain(wrap=False, **options).apply(images, parameters)
    copied, _ = copier.apply(images, dataclasses.replace(parameters, color=torch.zeros_like(parameters.color)))
    assert (wrapped != clipped).any()
    for number in range(len(images)):
        inside = masks[number, 0] > 0
        expected_wrapped = copied[number, :, inside].double()
        expected_clipped = expected_wrapped.clone()
        for channel, gain in list(zip(parameters.channels[number], parameters.gains[number], strict=True))[
            : min(2, channels)
        ]:
            expected_wrapped[channel] = (255 * expected_wrapped[channel] * gain % 256 / 255).clamp(max=1)
            expected_clipped[channel] = (expected_clipped[channel] * gain).clamp(max=1)
        difference = (wrapped[number, :, inside] - expected_wrapped).abs()
        # At 256 exactly, rounding decides.
        assert (difference > 1e-4).float().mean() < 0.01
        torch.testing.assert_close(clipped[number, :, inside].double(), expected_clipped, atol=1e-5, rtol=0)


def test_channel_gain_range() -> None:
    images = torch.full((30, 3, 32, 32), 0.5)
    generator = plain(color_probabilities=(0.0, 0.0, 1.0), channel_gain=(0.4, 0.6))
    anomalous, _ = generator(images)
    changed = anomalous[anomalous != 0.5]
    assert changed.min() >= 0.5 * 0.4**2 - 1e-6
    assert changed.max() <= 0.3 + 1e-6


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
def test_jitter_agrees_with_torchvision(order: list[int]) -> None:
    images = torch.rand(4, 3, 20, 30)
    images[0] = images[0, :1]
    factors = torch.tensor([[0.7, 1.4, 1.0], [0.3, 1.3, 1.0], [0.5, 1.7, 1.0], [-0.4, 0.25, 0.0]])
    factors = torch.cat([factors, torch.tensor([[0.9], [1.1], [1.2], [0.5]])], dim=1)
    changed = jitter(images, factors.T, order, lambda gray: gray.mean((-2, -1), keepdim=True))
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for number in range(4):
        expected = images[number]
        for change in order:
            expected = operations[change](expected, factors[change, number].item())
        torch.testing.assert_close(changed[number], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("kind", "option"), [(0, "slight_jitter"), (1, "strong_jitter")])
def test_recoloring_by_jitter(kind: int, option: str) -> None:
    images = torch.rand(8, 3, 64, 64)
    probabilities = tuple(float(number == kind) for number in range(3))
    generator = plain(color_probabilities=probabilities, dilations=0, **{option: 0.4})
    parameters = generator.generate_parameters(images)
    assert (parameters.color == kind).all()
    spread = parameters.factors - torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert 0.2 < spread.abs().max() <= 0.4
    assert bool(spread[:, 2:].any()) == (kind == 0)
    anomalous, masks = generator.apply(images, parameters)
    copied, _ = plain(dilations=0).apply(
        images, dataclasses.replace(parameters, factors=parameters.factors * 0 + torch.eye(4)[3].neg() + 1)
    )
    # Pixel by pixel, contrast about the mean gray of what was pasted.
    for number in range(len(images)):
        inside = masks[number, 0] > 0
        expected = copied[number, :, inside][:, None]
        for change in parameters.order.tolist():
            factor = parameters.factors[number, change].item()
            if change == 3 and kind == 0:
                expected = F.adjust_hue(expected, factor)
            elif change < 2 or kind == 0:
                operation = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[change]
                expected = operation(expected, factor)
        torch.testing.assert_close(anomalous[number, :, inside], expected[:, 0], atol=2e-5, rtol=0)


def test_noise() -> None:
    images = torch.full((40, 3, 64, 64), 0.5)
    anomalous, masks = plain(noise_probability=1, noise_amplitude=0.05)(images)
    change = anomalous - images
    assert (change.amax(1) - change.amin(1)).max() < 1e-6
    inside = change[:, :1][masks > 0]
    assert inside.std() == pytest.approx(0.05, rel=0.05)
    assert inside.mean() == pytest.approx(0, abs=0.003)
    assert not torch.equal(change[0], change[1])
    anomalous, _ = plain(noise_probability=0)(images)
    torch.testing.assert_close(anomalous, images)
    anomalous, masks = plain(noise_probability=0.5)(images)
    noisy = (anomalous != images).flatten(1).any(1)
    assert 8 < noisy.sum() < 32


def test_color_probabilities() -> None:
    generator = FractalAnomalyGenerator(color_probabilities=(0.5, 0.0, 0.5))
    assert generator.generate_parameters(torch.rand(50, 1, 32, 32)).color.unique().tolist() == [0, 2]


def test_maps_and_points() -> None:
    images = torch.rand(4, 1, 64, 64)
    assert FractalAnomalyGenerator(maps=4).generate_parameters(images).systems.shape == (4, 4, 2, 3)
    torch.manual_seed(0)
    few = plain(points=20, dilations=0)(images)[1].sum()
    torch.manual_seed(0)
    assert plain(points=4000, dilations=0)(images)[1].sum() > 1.2 * few


def test_augment_gives_both_images_the_same_jitter() -> None:
    images = torch.rand(6, 3, 64, 64)
    generator = FractalAnomalyGenerator(jitter=0.2)
    torch.manual_seed(1)
    normal, anomalous, masks = generator.augment(images)
    assert (normal - images).abs().mean() > 0.01
    assert torch.equal(*(torch.where(masks > 0, 0, image) for image in (normal, anomalous)))
    torch.manual_seed(1)
    parameters = generator.generate_parameters(images)
    unjittered, same_masks = generator.apply(images, parameters)
    assert torch.equal(masks, same_masks)

    def mean_gray(_: Tensor) -> Tensor:
        return means.pop(0)

    # The anomalous image as a whole, about the normal image's own mean.
    factors = parameters.jitter
    order = parameters.order.tolist()
    means: list[Tensor] = []
    jitter(images, factors, order, lambda gray: means.append(gray.mean((-2, -1), keepdim=True)) or means[0])
    torch.testing.assert_close(anomalous, jitter(unjittered, factors, order, mean_gray))


def test_augment_without_jitter_is_forward() -> None:
    image = torch.rand(3, 64, 64)
    generator = FractalAnomalyGenerator(jitter=0)
    torch.manual_seed(1)
    anomalous, mask = generator(image)
    torch.manual_seed(1)
    normal, jittered, same_mask = generator.augment(image)
    torch.testing.assert_close(normal, image)
    torch.testing.assert_close(jittered, anomalous)
    assert torch.equal(mask, same_mask)


def test_object_mode_stays_on_the_object() -> None:
    images = with_object(60)
    generator = FractalAnomalyGenerator(object_mode=True, object_patch_size=(0.2, 0.6), points=500)
    parameters = generator.generate_parameters(images)
    side = parameters.side
    assert side.min() >= 7
    assert 20 < side.max() <= 26
    for corner in (parameters.source, parameters.target):
        center = (corner + side[:, None] // 2).float()
        assert ((center - torch.tensor([48.0, 70.0])).norm(dim=1) <= 23).all()
        assert center.std(0).min() > 5
    assert generator.apply(images, parameters)[1].flatten(1).any(1).all()


def test_object_mode_without_object_is_the_plain_mode() -> None:
    images = with_object(3).clone()
    images[1] = 0.9
    torch.manual_seed(5)
    mixed = FractalAnomalyGenerator(object_mode=True).generate_parameters(images)
    torch.manual_seed(5)
    simple = FractalAnomalyGenerator(object_mode=False).generate_parameters(images)
    for name in ("side", "source", "target"):
        assert torch.equal(getattr(mixed, name)[1], getattr(simple, name)[1])
    assert not torch.equal(mixed.target[[0, 2]], simple.target[[0, 2]])


def test_object_mode_where_no_patch_fits() -> None:
    images = torch.full((2, 1, 64, 64), 0.9)
    images[:, :, -4:, -40:] = 0.1
    generator = FractalAnomalyGenerator(object_mode=True, object_patch_size=(40.0, 50.0))
    assert (generator.generate_parameters(images).side <= 32).all()
    assert generator(images)[1].flatten(1).any(1).all()


def statistics(generator: FractalAnomalyGenerator, images: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Quantiles of mask area and of the mean absolute change inside the mask."""
    areas, changes = [], []
    for chosen in torch.randint(len(images), (draws // 10, 10)):
        normal = images[chosen]
        anomalous, masks = generator(normal)
        area = masks.sum((1, 2, 3))
        areas.append(area / masks[0].numel())
        changes.append(((anomalous - normal).abs().mean(1, keepdim=True) * masks).sum((1, 2, 3)) / area)
    return torch.cat(areas).quantile(QUANTILES), torch.cat(changes).quantile(QUANTILES)


def test_statistics_on_a_pattern() -> None:
    area, change = statistics(FractalAnomalyGenerator(), pattern()[None], 1000)
    torch.testing.assert_close(area, MASK_AREA, rtol=0.2, atol=0)
    torch.testing.assert_close(change, CHANGE_OF_PATTERN, rtol=0.2, atol=0)


@pytest.mark.skipif("ANOMALIB_FRACTALAD_TILES" not in os.environ, reason="needs a folder of magnetic tile images")
def test_statistics_on_magnetic_tiles() -> None:
    # The reference goes with the first hundred images; the later ones are brighter, so that more changes.
    paths = sorted(Path(os.environ["ANOMALIB_FRACTALAD_TILES"]).glob("train/good/*"))[:100]
    images = torch.stack([F.resize(read_image(str(path), ImageReadMode.RGB), [256, 256]) / 255 for path in paths])
    area, change = statistics(FractalAnomalyGenerator(), images, 1000)
    torch.testing.assert_close(area, MASK_AREA, rtol=0.2, atol=0)
    torch.testing.assert_close(change, CHANGE, rtol=0.2, atol=0)


def test_draem_takes_it_as_augmenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Draem(dtd_dir=tmp_path)
    model.augmenter = FractalAnomalyGenerator()
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    loss = model.training_step(ImageBatch(image=torch.rand(2, 3, 32, 32)))["loss"]
    assert loss.isfinite()
    assert loss.requires_grad


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_image_in_range(data: st.DataObject) -> None:
    channels = data.draw(st.sampled_from([1, 3]))
    shape = (data.draw(st.integers(1, 3)), channels, data.draw(st.integers(32, 80)), data.draw(st.integers(32, 80)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    images = {
        "black": torch.zeros(shape),
        "white": torch.ones(shape),
        "noise": torch.rand(shape),
        "binary": (torch.rand(shape) > 0.5).float(),
    }[data.draw(st.sampled_from(["black", "white", "noise", "binary"]))].to(dtype)
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "strided", "expanded"]))
    if layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    elif layout == "strided":
        images = images.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "expanded":
        images = images[:1].expand(shape)
    generator = FractalAnomalyGenerator(
        object_mode=data.draw(st.booleans()),
        probability=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        noise_probability=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        position_margin=data.draw(st.sampled_from([0.0, 0.1])),
        points=500,
    )
    before = images.clone()
    anomalous, masks = generator(images)
    normal, jittered, _ = generator.augment(images)
    assert torch.equal(images, before)
    assert anomalous.shape == shape
    assert masks.shape == (shape[0], 1, *shape[2:])
    for result in (anomalous, masks, normal, jittered):
        assert result.dtype == dtype
        assert result.isfinite().all()
        assert result.min() >= 0
        assert result.max() <= 1
    assert ((masks == 0) | (masks == 1)).all()
    assert not ((anomalous != images) & (masks == 0)).any()
    if generator.probability == 1:
        assert masks.flatten(1).any(1).all()


def test_nothing_depends_on_what_the_device_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors of this device hold no values: whatever reads one, as a wait for an accelerator does, raises.
    monkeypatch.setattr("anomalib_fractalad.transforms.fractal._full_precision", lambda _: nullcontext())
    results = FractalAnomalyGenerator().augment(torch.rand(2, 3, 48, 64, device="meta"))
    assert [tuple(result.shape) for result in results] == [(2, 3, 48, 64), (2, 3, 48, 64), (2, 1, 48, 64)]
    region = torch.ones(1, 48, 64, dtype=torch.bool, device="meta").expand(2, 1, -1, -1)
    FractalAnomalyGenerator().augment(torch.rand(2, 3, 48, 64, device="meta"), region)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu() -> None:
    images = torch.rand(4, 3, 64, 64, device="cuda")
    generator = FractalAnomalyGenerator()
    generator.augment(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        generator.augment(images)
        wrong = generator(images - 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong[0].isnan().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("object_mode", [False, True])
def test_cuda_agrees_with_cpu(object_mode: bool) -> None:
    images = with_object(16) * torch.linspace(0.9, 1, 16)[:, None, None, None]
    generator = FractalAnomalyGenerator(object_mode=object_mode)
    parameters = generator.generate_parameters(images)
    anomalous, masks = generator.apply(images, parameters)
    on_gpu = parameters.to("cuda")
    for given_parameters in (parameters, on_gpu):
        gpu_anomalous, gpu_masks = generator.apply(images.cuda(), given_parameters)
        assert gpu_anomalous.is_cuda
        assert (gpu_masks.cpu() != masks).float().mean() < 1e-3
        assert ((gpu_anomalous.cpu() - anomalous).abs() > 1e-3).float().mean() < 2e-3
    anomalous, masks = generator(images.cuda())
    assert masks.flatten(1).any(1).all()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.rand(3, 64, 64) * 2 - 1, ValueError, "before normalization"),
        (torch.full((3, 64, 64), float("nan")), ValueError, "before normalization"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(1, 64, 64, dtype=torch.bool), TypeError, "bool"),
        (tv_tensors.Mask(torch.zeros(2, 1, 64, 64)), TypeError, "mask"),
        (torch.rand(3, 31, 64), ValueError, "31 x 64.*32"),
        (torch.rand(4, 64, 64), ValueError, "1 or 3 channels"),
        (torch.rand(64, 64), ValueError, r"\(C, H, W\)"),
        (torch.rand(0, 3, 64, 64), ValueError, r"\(0, 3, 64, 64\)"),
    ],
)
def test_wrong_images_are_refused(image: Tensor, error: type[Exception], message: str) -> None:
    generator = FractalAnomalyGenerator()
    with pytest.raises(error, match=message):
        generator(image)
    with pytest.raises(error, match=message):
        generator.augment(image)


SIGNATURE = inspect.signature(FractalAnomalyGenerator).parameters
NUMBERS = [name for name, parameter in SIGNATURE.items() if type(parameter.default) in {int, float}]
RANGES = ["patch_size", "channel_gain", "rotation", "object_patch_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"position_margin": 0.3},
            r"position_margin=0.3: must lie in \[0, 0.25\].*patch_size must end at 0.4 or below",
        ),
        ({"patch_size": (0.1, 0.9)}, r"position_margin=0.1: must lie in \[0, 0.05\].*patch_size must end at 0.8"),
        ({"position_margin": 0.2, "patch_size": (0.1, 0.7)}, r"\[0, 0.15\].*patch_size=\(0.1, 0.7\)"),
        ({"position_margin": -0.1}, r"position_margin=-0.1: must lie in \[0, 0.25\]"),
    ],
)
def test_a_margin_that_leaves_no_room_is_named_with_what_works(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FractalAnomalyGenerator(**options)


@pytest.mark.parametrize("margin", [0.05, 0.15, 0.2, 0.25, 0.45])
def test_the_largest_margin_works(margin: float) -> None:
    generator = plain(position_margin=margin, patch_size=(0.01, 1 - 2 * margin))
    assert generator(torch.rand(1, 3, 64, 64))[1].any()


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": (0.5, 0.1)},
        {"position_margin": 0.6},
        {"color_probabilities": (0.5, 0.5, 0.5)},
        {"color_probabilities": (1.0, 0.0)},
        {"color_probabilities": (1.5, -0.5, 0.0)},
        {"slight_jitter": 0.6},
        {"strong_jitter": -0.1},
        {"channel_gain": (-1.0, 1.0)},
        {"flip_probability": 1.1},
        {"rotation": (75.0, 15.0)},
        {"maps": 1},
        {"points": 0},
        {"dilations": -1},
        {"noise_probability": 2.0},
        {"noise_amplitude": -0.1},
        {"jitter": 0.7},
        {"object_patch_size": (0.1,)},
        *({name: float("nan")} for name in NUMBERS),
        *({name: float("inf")} for name in NUMBERS),
        *({name: True} for name in NUMBERS),
        *({name: (0.0, float("inf"))} for name in RANGES),
        *({name: (float("nan"), 0.5)} for name in RANGES),
        *({name: 0.3} for name in RANGES),
        *({name: 2.5} for name in ("maps", "points", "dilations")),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}="):
        FractalAnomalyGenerator(**options)


def test_larger_patches_make_larger_masks() -> None:
    images = torch.rand(60, 1, 64, 64)
    areas = [plain(patch_size=(size, size))(images)[1].mean() for size in (0.1, 0.3, 0.6)]
    assert all(small < large for small, large in pairwise(areas))


def test_autocast_does_not_reach_the_generator() -> None:
    image = torch.rand(4, 3, 64, 64)
    torch.manual_seed(1)
    expected = FractalAnomalyGenerator().augment(image)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        ours = FractalAnomalyGenerator().augment(image)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
