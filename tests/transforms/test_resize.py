# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Resize

from anomalib_fractalad.export.resize import AntialiasedResize, keep_antialiasing


@pytest.mark.parametrize("source", [(512, 512), (300, 457), (100, 90), (64, 64), (1, 1), (33, 1000)])
def test_equals_torchvision(source: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *source)
    torch.testing.assert_close(
        AntialiasedResize((64, 80))(image),
        Resize((64, 80), antialias=True)(image),
        rtol=0,
        atol=1e-5,
    )


def test_an_image_of_the_target_size_is_left_alone() -> None:
    image = torch.rand(1, 3, 40, 50)
    assert torch.equal(AntialiasedResize((40, 50))(image), image)


def test_only_antialiased_bilinear_resizes_are_replaced() -> None:
    assert isinstance(keep_antialiasing(Resize((4, 5))), AntialiasedResize)
    assert isinstance(keep_antialiasing(Resize((4, 5), antialias=False)), Resize)
    assert isinstance(keep_antialiasing(Resize((4, 5), interpolation=InterpolationMode.BICUBIC)), Resize)
    assert isinstance(keep_antialiasing(Resize([4])), Resize)
    composed = keep_antialiasing(Compose([Resize((8, 8)), CenterCrop(4)]))
    assert [type(step) for step in composed.transforms] == [AntialiasedResize, CenterCrop]
    assert keep_antialiasing(None) is None
