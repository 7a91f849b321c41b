# SPDX-License-Identifier: Apache-2.0
"""The stock ``anomalib`` program with this package's models, data and config files."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.models import get_model
from conftest import assert_same_weights, save, tile_arguments
from docstring_parser import parse

import anomalib_fractalad
from anomalib_fractalad import AAND, ADPS, FractalAD, FractalMemory
from anomalib_fractalad.__main__ import config_files, main
from anomalib_fractalad.registration import MODELS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SMALL = ["--model.backbone", "test_resnet", "--model.pre_trained", "false"]
RESIZE = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}
PRE_PROCESSOR = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": RESIZE}}
SMALL_IMAGES = ["--model.pre_processor", json.dumps(PRE_PROCESSOR)]


def data_arguments(root: Path) -> list[str]:
    return [
        *("--data", "Folder", "--data.name", "tiles", "--data.root", str(root)),
        *("--data.normal_dir", "train/good", "--data.normal_test_dir", "test/good"),
        *("--data.abnormal_dir", "test/blot", "--data.mask_dir", "ground_truth/blot"),
        *("--data.num_workers", "0", "--data.train_batch_size", "4", "--data.val_split_mode", "same_as_test"),
    ]


def cli(*arguments: object, run: bool = True) -> AnomalibCLI:
    return AnomalibCLI([str(argument) for argument in arguments], run=run)


@pytest.mark.parametrize(
    ("command", "model"),
    [*(("train", name) for name in MODELS), *zip(("fit", "validate", "test"), MODELS, strict=False)],
)
def test_commands_take_the_model_by_name(command: str, model: str, tmp_path: Path, tile_root: Path) -> None:
    program = cli(
        *(command, "--model", model, *SMALL, *data_arguments(tile_root), "--default_root_dir", tmp_path),
        run=False,
    )
    assert type(program.model) is getattr(anomalib_fractalad, model)


@pytest.mark.parametrize("path", ["FractalAD", "anomalib.models.FractalAD", "anomalib_fractalad.FractalAD"])
def test_config_files_take_every_class_path(path: str, tmp_path: Path) -> None:
    config = {"model": {"class_path": path, "init_args": {"backbone": "test_resnet", "pre_trained": False}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    program = cli("fit", "--config", tmp_path / "config.yaml", "--default_root_dir", tmp_path, run=False)
    assert type(program.model) is anomalib_fractalad.FractalAD


def test_from_training_to_export(tmp_path: Path, tile_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Train, validate, test, predict and export one after the other, as a user would."""
    results = ("--default_root_dir", tmp_path)
    data = data_arguments(tile_root)
    model = ("--model", "FractalMemory", *SMALL, *SMALL_IMAGES)
    cli("train", *model, *data, *results, "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu")
    (checkpoint,) = tmp_path.rglob("v0/weights/lightning/model.ckpt")
    from_checkpoint = ("--ckpt_path", checkpoint, "--trainer.accelerator", "cpu")
    for command in ("validate", "test"):
        cli(command, *model, *data, *results, *from_checkpoint)
    cli("predict", *model, *results, *from_checkpoint, "--data", tile_root / "test" / "blot")
    assert len(list(tmp_path.rglob("images/**/*.png"))) >= 8 + 4
    cli("export", *model, "--export_type", "openvino", "--export_root", tmp_path / "exported", *from_checkpoint)
    assert list((tmp_path / "exported").rglob("model.xml"))
    printed = "".join(capfd.readouterr())
    assert "image_AUROC" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(("command", "model"), zip(("train", "fit") * 2, MODELS, strict=True))
def test_the_seed_fixes_the_weights(command: str, model: str, tmp_path: Path, tile_root: Path) -> None:
    def weights(*seed: object) -> torch.Tensor:
        torch.rand(1)
        arguments = ("--model", model, *SMALL, *data_arguments(tile_root), "--default_root_dir", tmp_path)
        program = cli(command, *arguments, *seed, run=False)
        return torch.cat([parameter.detach().flatten() for parameter in program.model.parameters()])

    seeded = weights("--seed_everything", 3)
    assert torch.equal(seeded, weights("--seed_everything", 3))
    assert not torch.equal(seeded, weights("--seed_everything", 4))
    assert not torch.equal(weights("--seed_everything", "false"), weights("--seed_everything", "false"))


def test_a_seed_that_is_not_given_is_logged(
    tmp_path: Path,
    tile_root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    arguments = ("--model", "FractalAD", *SMALL, *data_arguments(tile_root), "--default_root_dir", tmp_path)
    with caplog.at_level("INFO", "lightning.fabric.utilities.seed"):
        program = cli("train", *arguments, run=False)
    assert "Seed set to 7" in caplog.text
    assert program.config["train"]["seed_everything"] == 7


def test_a_training_is_resumed_within_an_epoch(tmp_path: Path, tile_root: Path) -> None:
    arguments = (
        *("fit", "--model", "FractalAD", *SMALL, *SMALL_IMAGES, *data_arguments(tile_root)),
        *("--default_root_dir", tmp_path, "--trainer.max_epochs", 2, "--trainer.accelerator", "cpu"),
    )
    every_step = {"dirpath": tmp_path, "filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1}
    callback = [argument for name, value in every_step.items() for argument in (f"--trainer.callbacks.{name}", value)]
    unbroken = cli(*arguments, "--trainer.callbacks", "anomalib.callbacks.ModelCheckpoint", *callback)
    resumed = cli(*arguments, "--ckpt_path", tmp_path / "step=1.ckpt", "--seed_everything", 5)
    assert resumed.model.trainer.global_step == unbroken.model.trainer.global_step == 4
    assert_same_weights(unbroken.model, resumed.model)


def test_anomalibs_benchmark(tmp_path: Path, tile_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tile_arguments(tile_root)
    arguments = {"backbone": "test_resnet", "pre_trained": False, "epochs": 1}
    models = [{"class_path": name, "init_args": arguments} for name in (*MODELS, "anomalib_fractalad.FractalAD")]
    models.append({"class_path": "Padim", "init_args": {"backbone": "resnet18", "pre_trained": False}})
    config = {
        "accelerator": "cpu",
        "benchmark": {
            "seed": 0,
            "model": {"grid": models},
            "data": {"class_path": "Folder", "init_args": folder},
        },
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    cli("benchmark", "--config", "benchmark.yaml")
    (file,) = tmp_path.glob("runs/benchmark/*/results.csv")
    results = pd.read_csv(file)
    assert len(results) == len(models)
    assert results["image_AUROC"].notna().all()
    assert results["pixel_AUPRO"].notna().sum() == len(models) - 1  # not among Padim's metrics


CONFIGS = [path for name, path in config_files().items() if "benchmark" not in name]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_command_in_each_config_file(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    save(np.zeros((8, 8), np.uint8), tmp_path / "texture.png")
    (command,) = (line for line in config.read_text().splitlines() if line.startswith("# anomalib train"))
    assert f"configs/{config.name}" in command
    program = cli(
        *(argument.replace("PATH", str(tmp_path)) for argument in command.split()[2:]),
        *(*SMALL, "--default_root_dir", tmp_path, "--data.init_args.root", tmp_path / "data"),
        run=False,
    )
    expected = {"aand": AAND, "adps": ADPS, "quickstart": FractalMemory, "recommended": FractalMemory}.get(
        config.stem.partition("_")[0], FractalAD
    )
    assert type(program.model) is expected
    assert Path(program.datamodule.root) == tmp_path / "data"


def test_small_configs_go_on_top_of_others(tmp_path: Path) -> None:
    def train(*names: str) -> AnomalibCLI:
        files = [argument for name in names for argument in ("--config", config_files()[name])]
        return cli("train", *files, *SMALL, "--default_root_dir", tmp_path, "--data.root", tmp_path, run=False)

    texture = train("fractalad", "fractalad_texture")
    assert (texture.model.weight_decay, texture.model.learning_rate) == (0.01, 0.001)
    assert texture.datamodule.category == "carpet"
    fine = train("magnetic_tile", "aand_coarse_centered_slim", "aand_fine_embedding")
    assert isinstance(fine.model, AAND)
    assert fine.model.hparams["fine_embedding"]
    assert fine.model.hparams["amplifier_width"] == 128
    assert (fine.datamodule.train_batch_size, fine.datamodule.eval_batch_size) == (16, 32)
    assert fine.datamodule.abnormal_dir[0] == "test/blowhole"
    assert fine.config["train"]["trainer"]["max_epochs"] == 66


def test_information_on_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("quickstart", "quickstart.yaml"):
        assert main(["config", name]) == 0
        assert Path(capsys.readouterr().out.strip()).samefile(ROOT / "configs" / "quickstart.yaml")
    main(["config"])
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in listed] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert all(text.endswith(".") for _, text in listed)
    assert main(["status"]) == 0
    assert f"models: {', '.join(MODELS)}\n" in capsys.readouterr().out
    for wrong in (["config", "quick"], ["configs"], ["status", "all"], []):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="0"):
        main(["config", "--help"])
    assert "usage: anomalib-fractalad config [-h] [name]" in capsys.readouterr().out


@pytest.mark.parametrize("model", MODELS)
def test_every_option_has_a_help_text(model: str) -> None:
    model_class = getattr(anomalib_fractalad, model)
    options = inspect.signature(model_class).parameters
    documented = {entry.arg_name: entry.description for entry in parse(model_class.__doc__).params}
    assert list(options) == list(documented)
    assert all(documented.values())


def test_the_help_of_a_model_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli("train", "--model.help", "FractalAD")
    printed = " ".join(capsys.readouterr().out.split())
    assert "top_share" in printed
    assert "Share of the pixels, above 0 and at most 1, that the score top takes." in printed


def test_models_are_made_by_name() -> None:
    model = get_model("fractalad", backbone="test_resnet", pre_trained=False, top_share=0.1)
    assert type(model) is anomalib_fractalad.FractalAD
