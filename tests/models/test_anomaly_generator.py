# SPDX-License-Identifier: Apache-2.0
"""The choice of the anomaly generator that ADPS and AAND share."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from conftest import save
from omegaconf import OmegaConf
from torch import Tensor
from torchvision.transforms.v2 import Transform

from anomalib_fractalad import FractalAnomalyGenerator
from anomalib_fractalad.models.components import AnomalyGenerator

images = torch.full((4, 3, 64, 96), 0.5)


class Stripes(Transform):
    """A generator that the package does not know."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.zeros_like(image[:, :1])
        mask[..., :8] = 1
        return image + 2 * mask, mask.bool()


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    for name in ("one.png", "deeper/two.png"):
        save(torch.randint(0, 256, (20, 30, 3)).numpy(), tmp_path / "textures" / name)
    return tmp_path / "textures"


def make(choice: Any = None, **arguments: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return AnomalyGenerator(choice, **arguments)(images)


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("kind", [PerlinAnomalyGenerator, FractalAnomalyGenerator])
def test_every_way_of_choosing_gives_the_same_anomalies(kind: type[Transform]) -> None:
    description = {"class_path": kind.__name__, "init_args": {"probability": 1.0}}
    expected = make(description)
    full_path = {**description, "class_path": f"{kind.__module__}.{kind.__name__}"}
    assert_same(make(full_path), expected)
    assert_same(make(OmegaConf.create(description)), expected)
    assert expected[1].flatten(1).amax(dim=1).tolist() == [1, 1, 1, 1]


def test_an_object_is_used_itself() -> None:
    generator = FractalAnomalyGenerator(probability=1.0)
    assert_same(make(generator), make({"class_path": "FractalAnomalyGenerator", "init_args": {"probability": 1.0}}))
    assert_same(make("FractalAnomalyGenerator"), make(FractalAnomalyGenerator()))


def test_left_out_it_is_perlin_with_the_models_probability() -> None:
    for probability in (0.0, 1.0):
        _, mask = make(probability=probability)
        assert mask.flatten(1).amax(dim=1).tolist() == [probability] * 4
    described = {"class_path": "PerlinAnomalyGenerator", "init_args": {"probability": 0.7}}
    assert AnomalyGenerator(probability=0.7).spec == AnomalyGenerator(described).spec


def test_images_stay_images() -> None:
    anomalous, mask = make(Stripes())
    assert mask.dtype == images.dtype
    assert anomalous.max() == 1
    assert torch.equal(mask > 0, (anomalous != images).any(dim=1, keepdim=True))
    torch.manual_seed(0)
    bare = PerlinAnomalyGenerator(probability=1.0)
    values = torch.stack([bare(torch.zeros(16, 3, 32, 32))[0] for _ in range(8)])
    assert values.min() < 0, "Perlin no longer leaves [0, 1]: clamping can go"
    ours = AnomalyGenerator(bare)
    assert all(ours(torch.zeros(16, 3, 32, 32))[0].min() >= 0 for _ in range(8))


def test_building_a_generator_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    AnomalyGenerator()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "generator",
    [
        PerlinAnomalyGenerator(probability=0.9, blend_factor=(0.1, 0.3), rotation_range=(-10, 20), dual_mask=True),
        PerlinAnomalyGenerator(blend_factor=0.25),
        FractalAnomalyGenerator(probability=0.9, object_mode=True, patch_size=(0.2, 0.3)),
    ],
)
def test_what_a_checkpoint_records_makes_the_same_anomalies(generator: Transform, tmp_path: Path) -> None:
    described = AnomalyGenerator(generator).spec
    torch.save(described, tmp_path / "record.pt")
    record = torch.load(tmp_path / "record.pt", weights_only=True)
    rebuilt = AnomalyGenerator(record)
    assert rebuilt.spec == described
    arguments = {name: value for name, value in record.items() if name != "recorded"}
    assert_same(make(record), make(arguments))
    assert AnomalyGenerator(arguments).spec == described


def test_textures_are_used_and_recorded(textures: Path) -> None:
    bare, textured = AnomalyGenerator(probability=1.0), AnomalyGenerator(None, textures, probability=1.0)
    assert textured.spec["init_args"]["anomaly_source_path"] == str(textures)
    torch.manual_seed(0)
    first = textured(images)
    torch.manual_seed(0)
    assert_same(AnomalyGenerator(textured.spec)(images), first)
    torch.manual_seed(0)
    assert not torch.equal(bare(images)[0], first[0])
    by_object = AnomalyGenerator(PerlinAnomalyGenerator(textures, probability=1.0))
    assert by_object.spec == textured.spec
    assert AnomalyGenerator(PerlinAnomalyGenerator(probability=1.0), textures).spec == textured.spec
    described = {"class_path": "PerlinAnomalyGenerator", "init_args": {"probability": 1.0}}
    assert AnomalyGenerator(described, str(textures)).spec == textured.spec


def test_a_record_is_not_built_before_training(textures: Path, tmp_path: Path) -> None:
    record = AnomalyGenerator(None, textures).spec
    moved = textures.rename(tmp_path / "moved")
    restored = AnomalyGenerator(record)
    with pytest.raises(ValueError, match=r"checkpoint records cannot be built.*textures.*holds no images"):
        restored.prepare()
    AnomalyGenerator(record, moved).prepare()


def test_an_unknown_generator_has_to_be_passed_again() -> None:
    record = AnomalyGenerator(Stripes()).spec
    assert record == {"class_path": f"{__name__}.Stripes", "init_args": None, "recorded": True}
    restored = AnomalyGenerator(record)
    with pytest.raises(ValueError, match=r"Stripes.*pass anomaly_generator .*to load_from_checkpoint"):
        restored(images)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("Nope", r"'Nope'.*is unknown; use class_path \(one of PerlinAnomalyGenerator, FractalAnomalyGenerator\)"),
        ({"class_path": "os.system"}, "'os.system'.*is unknown"),
        ({"class_path": "elsewhere.PerlinAnomalyGenerator"}, "is unknown"),
        ({"init_args": {}}, "is unknown"),
        ({"class_path": "PerlinAnomalyGenerator", "args": {}}, "is unknown"),
        ({"class_path": "PerlinAnomalyGenerator", "init_args": {"chance": 1}}, "PerlinAnomalyGenerator: .*chance"),
        ({"class_path": "FractalAnomalyGenerator", "init_args": {"probability": 2.0}}, "probability"),
    ],
)
def test_wrong_descriptions_are_refused(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyGenerator(choice)


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="anomaly_generator is 3; it must be"):
        AnomalyGenerator(3)


def test_textures_that_are_of_no_use_are_refused(textures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FractalAnomalyGenerator takes no texture images; leave it out"):
        AnomalyGenerator("FractalAnomalyGenerator", textures)
    with pytest.raises(ValueError, match=r"Stripes takes no texture images"):
        AnomalyGenerator(Stripes(), textures)
    with pytest.raises(ValueError, match=r"'.*missing' holds no images"):
        AnomalyGenerator(None, tmp_path / "missing")
    with pytest.raises(ValueError, match=r"two folders of texture images"):
        AnomalyGenerator(PerlinAnomalyGenerator(textures / "deeper"), textures)


@pytest.mark.parametrize(
    "wrong",
    [lambda image: image, lambda image: (image, image), lambda image: (image[..., :8], image[:, :1])],
)
def test_a_transform_with_another_contract_is_refused(wrong: Any) -> None:
    class Wrong(Transform):
        def forward(self, image: Tensor) -> Any:
            return wrong(image)

    with pytest.raises(ValueError, match=r"Wrong must turn images \(4, 3, 64, 96\) into a tuple"):
        AnomalyGenerator(Wrong())(images)
