# SPDX-License-Identifier: Apache-2.0
"""A file that would run code if it were unpickled does not, whichever way it comes in."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import ExportType, TorchInferencer
from conftest import small_engine
from test_all_models import small_model

from anomalib_fractalad.registration import MODELS

WAYS: dict[str, Callable[[Any, Path, Folder, Path], Any]] = {
    "load_from_checkpoint": lambda model, file, _data, _folder: type(model).load_from_checkpoint(file),
    "fit": lambda model, file, data, folder: small_engine(folder).fit(model, datamodule=data, ckpt_path=file),
    "validate": lambda model, file, data, folder: small_engine(folder).validate(
        model=model, datamodule=data, ckpt_path=file
    ),
    "test": lambda model, file, data, folder: small_engine(folder).test(model, datamodule=data, ckpt_path=file),
    "predict": lambda model, file, data, folder: small_engine(folder).predict(model, datamodule=data, ckpt_path=file),
    "export": lambda model, file, _data, folder: small_engine(folder).export(
        model, ExportType.TORCH, export_root=folder, ckpt_path=file
    ),
}


class Unpickled:
    """Would write a file if it were unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture
def harm(tmp_path: Path) -> Path:
    return tmp_path / "harm"


def save_checkpoint(model: Any, file: Path, **extra: Any) -> None:
    checkpoint = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "pytorch-lightning_version": "2.6.0",
        **extra,
    }
    model.on_save_checkpoint(checkpoint)
    torch.save({**checkpoint, **extra}, file)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["state_dict", "random_states"])
def test_no_checkpoint_is_unpickled(name: str, way: str, place: str, harm: Path, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    file = tmp_path / "evil.ckpt"
    save_checkpoint(model, file, **{place: Unpickled(harm)})
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        WAYS[way](model, file, tiles, tmp_path)
    assert not harm.exists()
    torch.load(file, weights_only=False)
    assert harm.exists()  # it would have


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_need_no_unpickling(name: str, tmp_path: Path) -> None:
    file = tmp_path / "good.ckpt"
    save_checkpoint(small_model(name), file)
    assert torch.load(file, weights_only=True)["hyper_parameters"]["backbone"] == "test_resnet"
    small_model(name).load_from_checkpoint(file)


def test_a_recorded_generator_is_not_imported(harm: Path, tmp_path: Path) -> None:
    model = small_model("ADPS")
    file = tmp_path / "evil.ckpt"
    record = {"class_path": "pathlib.Path.touch", "init_args": {"self": str(harm)}, "recorded": True}
    save_checkpoint(model, file, hyper_parameters={**model.hparams, "anomaly_generator": record})
    loaded = type(model).load_from_checkpoint(file)
    with pytest.raises(ValueError, match="cannot be built"):
        loaded.generator(torch.rand(1, 3, 64, 64))
    assert not harm.exists()


def test_what_a_checkpoint_names_is_not_called(tmp_path: Path) -> None:
    model = small_model("ADPS")
    file = tmp_path / "evil.ckpt"
    save_checkpoint(model, file, hyper_parameters={**model.hparams, "_instantiator": "os.system"})
    with pytest.raises(ValueError, match="was blocked to prevent arbitrary code execution"):
        type(model).load_from_checkpoint(file)


def test_torch_inferencer_unpickles_only_when_it_is_told_to(
    harm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    file = tmp_path / "evil.pt"
    torch.save({"model": Unpickled(harm)}, file)
    with pytest.raises(ValueError, match="TRUST_REMOTE_CODE=1"):
        TorchInferencer(file, device="cpu")
    assert not harm.exists()
