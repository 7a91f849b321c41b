# SPDX-License-Identifier: Apache-2.0
"""The backbone's weights from a local file, and what timm normalizes images with for them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from conftest import in_onnx_runtime
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.models import load_state_dict
from torch.utils._pytree import tree_leaves
from torchvision.transforms.v2 import Normalize, ToTensor

import anomalib_fractalad
from anomalib_fractalad.models.components import Backbone, FrozenTeacher
from anomalib_fractalad.models.components.backbone import Normalization
from anomalib_fractalad.registration import MODELS

BACKBONE = "test_resnet"


@pytest.fixture
def network() -> Any:
    return timm.create_model(BACKBONE)


@pytest.fixture
def checkpoint(network: Any, tmp_path: Path) -> Path:
    file = tmp_path / "teacher.safetensors"
    save_file(network.state_dict(), file)
    return file


def teacher(weights: Path, name: str = BACKBONE) -> FrozenTeacher:
    return FrozenTeacher(name, (4, 16), pre_trained=True, weights=weights)


def assert_taken_over(module: FrozenTeacher, network: Any) -> None:
    theirs = network.state_dict()
    ours = module.features.state_dict()
    assert ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("classes", [0, 7])
def test_weights_come_from_the_file(network: Any, tmp_path: Path, ending: str, classes: int) -> None:
    network.reset_classifier(classes)
    file = tmp_path / f"teacher{ending}"
    (save_file if ending == ".safetensors" else torch.save)(network.state_dict(), file)
    assert_taken_over(teacher(file), network)


def test_weights_are_held_once(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(teacher(checkpoint), tmp_path / "module.pt")
    alone = FrozenTeacher(BACKBONE, (4, 16), pre_trained=False)
    torch.save(alone, tmp_path / "random.pt")
    size, expected = (tmp_path / "module.pt").stat().st_size, (tmp_path / "random.pt").stat().st_size
    assert size < 1.05 * expected


def test_missing_and_superfluous_weights_are_named(network: Any, tmp_path: Path) -> None:
    weights = network.state_dict()
    del weights["layer1.0.conv1.weight"]
    weights["layer9.weight"] = torch.zeros(1)
    weights["conv1.0.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError,
        match=r"odd.pth' are not those of backbone 'test_resnet'. Missing: layer1.0.conv1.weight; "
        r"superfluous: layer9.weight; of another shape: conv1.0.weight\.",
    ):
        teacher(tmp_path / "odd.pth")


def test_weights_of_another_network_are_refused_briefly(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"not those of backbone 'resnet18'. Missing: .* and \d+ more") as refusal:
        teacher(checkpoint, "resnet18")
    assert len(str(refusal.value)) < 600


class Unpickled:
    """Would write a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def load_anything(file: str, use_ema: bool = True, device: str = "cpu", weights_only: bool = False) -> Any:
    """timm's loader with the default of older versions."""
    return load_state_dict(file, use_ema, device, weights_only)


def test_nothing_but_weights_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_fractalad.models.components.backbone.load_state_dict", load_anything)
    torch.save({"conv1.weight": Unpickled(tmp_path / "harm")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth' cannot be read"):
        teacher(tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, ending: str, content: bytes) -> None:
    file = tmp_path / f"notes{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"notes{ending}' cannot be read as a timm checkpoint"):
        teacher(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth', but there is no such file"):
        teacher(tmp_path / "nowhere.pth")


def test_weights_contradict_random_ones(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="but pre_trained is false"):
        FrozenTeacher(BACKBONE, (4,), pre_trained=False, weights=checkpoint)


@pytest.mark.parametrize("name", MODELS)
def test_models_take_weights_and_do_without_the_file_once_trained(
    name: str,
    checkpoint: Path,
    network: Any,
    tiles: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    kind = getattr(anomalib_fractalad, name)
    extra = {"layers": (4, 8, 16), "patches": 2} if name == "ADPS" else {}
    model = kind(backbone=BACKBONE, weights=checkpoint, visualizer=False, **extra)
    assert_taken_over(model.model.teacher, network)
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=tiles)
    saved = next(tmp_path.rglob("*.ckpt"))
    contents = torch.load(saved, weights_only=True)
    assert contents["hyper_parameters"]["weights"] == str(checkpoint)
    tensors = [tensor for tensor in tree_leaves(contents) if isinstance(tensor, torch.Tensor)]
    for weight in model.model.teacher.parameters():
        if weight.ndim == 4:
            same = [tensor for tensor in tensors if tensor.shape == weight.shape and torch.equal(tensor, weight)]
            assert len(same) == 1
    assert saved.stat().st_size < 1.1 * sum(tensor.nbytes for tensor in tensors)
    checkpoint.unlink()
    loaded = kind.load_from_checkpoint(saved)
    assert_taken_over(loaded.model.teacher, network)


IMAGENET = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
NAMES = ["tf_efficientnet_lite0", "resnet18", "inception_v3", "resnet50_clip.openai"]


def without_normalization(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as it was before mean and deviation were part of it."""
    return {name: value for name, value in state.items() if ".normalize." not in f".{name}"}


@pytest.mark.parametrize("name", NAMES)
def test_features_are_those_of_timms_own_normalization(name: str) -> None:
    backbone = Backbone(name, (8,), pre_trained=False).eval()
    network = timm.create_model(name, features_only=True, out_indices=(2,)).eval()
    network.load_state_dict(backbone.features.state_dict())
    settings = resolve_data_config({"input_size": (3, 96, 96), "crop_pct": 1.0}, model=network)
    image = Image.effect_noise((96, 96), 80).convert("RGB")
    plain = ToTensor()(image)[None]
    with torch.no_grad():
        (expected,) = network(create_transform(**settings)(image)[None])
        (found,) = backbone(plain)
        (by_imagenet,) = network(IMAGENET(plain))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    changed = (by_imagenet - expected).abs().max() > 1e-3 * expected.abs().max()
    assert changed == (name != "resnet18")


def test_what_timm_does_not_record_is_imagenets() -> None:
    images = torch.rand(1, 3, 8, 8)
    for known in ({}, {"mean": None, "std": None}, {"architecture": "mine"}):
        assert torch.equal(Normalization(known)(images), IMAGENET(images))


@pytest.mark.parametrize("name", ["FractalAD", "AAND", "ADPS"])
def test_older_states_keep_imagenets_normalization(name: str) -> None:
    extra = {"layers": (4, 8, 16), "patches": 2} if name == "ADPS" else {}
    trained, loaded = (
        getattr(anomalib_fractalad, name)(backbone=BACKBONE, pre_trained=False, **extra).eval() for _ in range(2)
    )
    backbones = [module for module in loaded.modules() if isinstance(module, Backbone)]
    images = torch.rand(1, 3, 64, 64)
    loaded.load_state_dict(trained.state_dict())
    assert all(torch.equal(backbone.normalize(images), 2 * images - 1) for backbone in backbones)
    loaded.load_state_dict(without_normalization(trained.state_dict()))
    for backbone in backbones:
        for ours, theirs in zip(Backbone.forward(backbone, images), backbone.features(IMAGENET(images)), strict=True):
            assert torch.equal(ours, theirs)
    again = type(loaded)(backbone=BACKBONE, pre_trained=False, **extra)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.model.teacher.normalize.mean, loaded.model.teacher.normalize.mean)
    with pytest.raises(RuntimeError, match=r"Missing.*teacher\.normalize\.mean.*teacher\.features"):
        loaded.load_state_dict({})
    again.load_state_dict({}, strict=False)
    assert torch.equal(again.model.teacher.normalize.mean, loaded.model.teacher.normalize.mean)


def test_an_export_normalizes_as_the_state_does(tmp_path: Path) -> None:
    backbone = Backbone(BACKBONE, (4,), pre_trained=False).eval()
    backbone.load_state_dict(without_normalization(backbone.state_dict()))
    images, file = torch.rand(1, 3, 32, 32), tmp_path / "backbone.onnx"
    names = {"input_names": ["input"], "output_names": ["features"]}
    torch.onnx.export(backbone, (images,), file, dynamo=True, verbose=False, **names)
    with torch.no_grad():
        (expected,) = backbone.features(IMAGENET(images))
    exported = torch.as_tensor(in_onnx_runtime(file, images).features)
    torch.testing.assert_close(exported, expected, atol=1e-4, rtol=1e-4)
