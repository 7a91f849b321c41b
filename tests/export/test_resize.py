# SPDX-License-Identifier: Apache-2.0
"""Transforms of a pre-processor, as they are exported."""

import pytest
import torch
from anomalib.data.transforms import SquarePad
from anomalib.pre_processing import PreProcessor
from conftest import small_model
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import (
    CenterCrop,
    ColorJitter,
    Compose,
    Grayscale,
    InterpolationMode,
    Pad,
    RandomApply,
    RandomCrop,
    Resize,
    Transform,
)

from anomalib_fractalad.export.pre_processing import exportable_transform, network_size
from anomalib_fractalad.export.resize import AntialiasedResize, ExportSquarePad

NEAREST, BICUBIC = InterpolationMode.NEAREST_EXACT, InterpolationMode.BICUBIC
SIZES = [(512, 512), (300, 457), (100, 90), (64, 64), (1, 1), (33, 1000), (65, 66), (63, 200)]
TRANSFORMS = [
    Resize((64, 80)),
    Resize((64, 80), antialias=False),
    Resize((64, 80), interpolation=BICUBIC),
    Resize(64),
    Resize(64, max_size=90),
    Resize(None, max_size=90),
    Resize(64, interpolation=BICUBIC),
    CenterCrop((64, 81)),
    SquarePad(),
    Pad((1, 2, 3, 4), fill=0.5),
    Compose([SquarePad(), Compose([Resize((64, 80)), CenterCrop(33)]), Grayscale(3)]),
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_an_exported_transform_does_what_it_did(transform: Transform) -> None:
    exported = exportable_transform(transform)
    for size in SIZES:
        image = torch.rand(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(exported(image), transform(image), rtol=0, atol=1e-5)
        at_one_size = exportable_transform(transform, size)
        torch.testing.assert_close(at_one_size(image), transform(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [Resize(64, antialias=False), Resize((64, 64), interpolation=NEAREST), Resize(64, interpolation=NEAREST)],
)
def test_what_takes_one_size_says_so(transform: Resize) -> None:
    with pytest.raises(ValueError, match=r"pre-processor's Resize\(size=\[64.* cannot be exported .* give input_size"):
        exportable_transform(Compose([transform]))
    image = torch.rand(2, 3, 70, 100)
    exported = exportable_transform(transform, (70, 100))
    torch.testing.assert_close(exported(image), transform(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("transform", [ColorJitter(0.5), RandomCrop(64), RandomApply([Grayscale(3)], p=0.01)], ids=str)
def test_random_transforms_are_refused(transform: Transform) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"the pre-processor's .* is random: .* train_augmentations"):
        exportable_transform(Compose([Resize((64, 64)), transform]))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_of_the_target_size_is_left_alone() -> None:
    image = torch.rand(1, 3, 40, 50)
    assert torch.equal(exportable_transform(Resize((40, 50)))(image), image)
    assert exportable_transform(None) is None


def test_what_does_nothing_to_images_of_one_size_is_left_out() -> None:
    transform = Compose([SquarePad(), Resize((64, 64)), CenterCrop(64), Resize((32, 32))])
    steps = [type(step) for step in exportable_transform(transform, (64, 64)).transforms]
    assert steps == [AntialiasedResize]
    steps = [type(step) for step in exportable_transform(transform).transforms]
    assert steps == [ExportSquarePad, AntialiasedResize, AntialiasedResize]


@pytest.mark.parametrize("resize", [Resize((256, 256)), Resize((256, 256), antialias=False)], ids=str)
def test_a_large_image_is_resized_in_bands(resize: Resize) -> None:
    """By the whole matrices, it would take 256 * (2048 + 256) * 2048 multiplications for each channel."""
    exported = exportable_transform(resize, (2048, 2048))
    with FlopCounterMode(display=False) as counter:
        exported(torch.rand(1, 3, 2048, 2048))
    assert counter.get_total_flops() < 0.2 * 2 * 3 * 256 * (2048 + 256) * 2048


def test_size_that_the_network_sees() -> None:
    assert network_size(Resize((64, 80))) == (64, 80)
    assert network_size(Compose([Resize(64), CenterCrop(48)])) == (48, 48)
    for transform in (None, Resize(64), Resize(64, max_size=65), Pad(8), SquarePad()):
        assert network_size(transform) is None
    assert network_size(Resize(64), (100, 150)) == (64, 96)
    assert small_model("ADPS", pre_processor=PreProcessor(Resize(64))).input_size is None


@pytest.mark.parametrize("name", ["AAND", "ADPS"])
def test_a_network_of_one_size_names_the_transform(name: str, tmp_path: str) -> None:
    model = small_model(name, pre_processor=PreProcessor(Compose([Resize(64)])))
    with pytest.raises(ValueError, match=r"(?s)whose pre-processor, Compose.*Resize\(size=\[64\].* give input_size"):
        model.to_onnx(tmp_path)
