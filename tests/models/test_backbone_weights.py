# SPDX-License-Identifier: Apache-2.0
"""The teacher's weights from a local file, for machines without a network."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

import anomalib_fractalad
from anomalib_fractalad.models.components import FrozenTeacher
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


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return {name.removeprefix("features."): value for name, value in module.state_dict().items()}


def assert_taken_over(module: FrozenTeacher, network: Any) -> None:
    theirs = network.state_dict()
    ours = weights_of(module)
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


def test_nothing_but_weights_is_unpickled(tmp_path: Path) -> None:
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
