# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of every epoch, the arguments that a checkpoint holds, and the ways to hand one over."""

import io
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.models import get_model
from conftest import assert_same_weights, make_tiles, small_engine
from lightning import Callback, Trainer, seed_everything
from test_all_models import small_model

import anomalib_fractalad
from anomalib_fractalad.post_processing import OrderPreservingPostProcessor
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training.given_arguments import _names_in

OTHERS: dict[str, dict[str, Any]] = {
    "FractalAD": {"score": "top", "top_share": 0.1},
    "ADPS": {"smoothing": 2.0, "patches": 1},
    "AAND": {"score": "top", "top_share": 0.1, "alignment": "centers"},
    "FractalMemory": {"top_share": 0.1, "sigma": 2},
}
TRAINING: dict[str, dict[str, Any]] = {
    "FractalAD": {"learning_rate": 0.01, "cosine_decay": True, "object_mode": True, "position_margin": 0.0},
    "ADPS": {"learning_rate": 0.01, "segmentation_weight": 2.0, "anomaly_generator": "FractalAnomalyGenerator"},
    "AAND": {"learning_rate": 0.01, "split": (1, 2), "hard_distillation": False, "object_mode": True},
    "FractalMemory": {"learning_rate": 0.01, "reservoir_size": 3000, "part_pattern": r"\d+", "lighting": 0.5},
}


class Interrupt(Callback):
    """Stops a training in a step, as its user, an error or a limit of time would."""

    def __init__(self, step: int, error: BaseException | None = None) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.should_stop = self.error is None
            if self.error is not None:
                raise self.error


def train(root: Path, data: Path, interval: int, *callbacks: Callback, checkpoint: Path | None = None) -> Any:
    """Three epochs of three steps."""
    seed_everything(99 if checkpoint else 1)
    model, datamodule = small_model("FractalAD"), make_tiles(data)
    datamodule.train_batch_size = 3
    engine = small_engine(root, max_epochs=3, check_val_every_n_epoch=interval, callbacks=list(callbacks))
    filters = list(warnings.filters)
    try:
        engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    except (SystemExit, RuntimeError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert list(warnings.filters) == filters
    return model


@pytest.mark.parametrize("interval", [1, 3])
def test_a_training_that_stops_goes_on_as_if_it_had_not(
    interval: int, tile_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = train(tmp_path / "unbroken", tile_root, interval)
    assert [file.name for file in (tmp_path / "unbroken").rglob("*.ckpt*")] == ["model.ckpt"]
    ways = {"error": Interrupt(5, RuntimeError("away")), "time": Interrupt(5)}
    if interval == 3:
        ways["user"] = Interrupt(7, KeyboardInterrupt())
    for way, interrupt in ways.items():
        caplog.clear()
        train(tmp_path / way, tile_root, interval, interrupt)
        (file,) = (tmp_path / way).rglob("*.ckpt*")
        assert file.name == ("last_epoch.ckpt" if interval == 3 else "model.ckpt")
        assert file.parent.parts[-2:] == ("weights", "lightning")
        assert (way == "time" and interval == 1) or f"ckpt_path={file} goes on from step" in caplog.text
        assert torch.load(file, weights_only=True)["global_step"] >= {"error": 3, "time": 3, "user": 6}[way]
        assert_same_weights(unbroken, train(tmp_path / way / "on", tile_root, interval, checkpoint=file))


def test_the_trainers_own_choice_of_checkpoints_is_respected(tile_root: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
    )
    trainer.fit(small_model("FractalAD"), datamodule=make_tiles(tile_root))
    train(tmp_path / "none", tile_root, 4, ModelCheckpoint(tmp_path, save_top_k=0))
    assert not list(tmp_path.rglob("*.ckpt"))
    for folder in ("one", "two"):  # without a validation; the second training leaves the first one's file alone
        train(tmp_path / folder, tile_root, 4, ModelCheckpoint(tmp_path, "model"))
    assert sorted(file.name for file in tmp_path.rglob("*.ckpt")) == ["last_epoch-v1.ckpt", "last_epoch.ckpt"]


@pytest.fixture(scope="module", params=list(MODELS))
def trained(request: pytest.FixtureRequest, tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(request.param)
    arguments = {**OTHERS[request.param], **TRAINING[request.param]}
    model = small_model(request.param, **arguments, post_processor=OrderPreservingPostProcessor(image_sensitivity=0.7))
    engine = small_engine(root, max_epochs=2)
    engine.fit(model, datamodule=make_tiles(tile_root))
    return model, Path(engine.best_model_path)


def plain_model(name: str, **arguments: Any) -> Any:
    """A model that is given no more than a network of the right shape."""
    kind = getattr(anomalib_fractalad, name)
    size = kind.configure_pre_processor((64, 64))
    extra = {"head": True} if name == "FractalMemory" else {}
    return kind(**{"backbone": "test_resnet", "pre_trained": False, "pre_processor": size, **extra, **arguments})


def scores(model: Any, file: Path, data: Path, root: Path) -> torch.Tensor:
    batches = small_engine(root).predict(model, datamodule=make_tiles(data), ckpt_path=file)
    return torch.cat([batch.pred_score for batch in batches])


def test_a_checkpoints_arguments_count_where_they_are_forgotten(
    trained: Any, tile_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = trained
    others, name = OTHERS[model.name], model.name
    expected = scores(model, file, tile_root, tmp_path)
    assert "The checkpoint was trained with" not in caplog.text
    forgetful = plain_model(name)
    torch.testing.assert_close(scores(forgetful, file, tile_root, tmp_path), expected)
    for argument, value in others.items():
        assert f"trained with {argument}={value!r}" in caplog.text
        assert forgetful.hparams[argument] == value
    assert "post_processor.image_sensitivity=0.7" in caplog.text
    assert "learning_rate" not in caplog.text
    assert forgetful.learning_rate == 0.01

    caplog.clear()
    argument, value = next(iter(others.items()))
    default = plain_model(name).hparams[argument]
    given = plain_model(name, **{argument: default}, post_processor=OrderPreservingPostProcessor(image_sensitivity=0.4))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(scores(given, file, tile_root, tmp_path), expected)
    assert f"trained with {argument}={value!r}, and this {name} was given {default!r}: that counts" in caplog.text
    assert given.post_processor.image_sensitivity == 0.4
    assert given.hparams[argument] == default

    caplog.clear()
    loaded = type(model).load_from_checkpoint(file)
    assert not caplog.text
    assert loaded.hparams[argument] == value
    sharp = type(model).configure_pre_processor((128, 128))
    loaded = type(model).load_from_checkpoint(io.BytesIO(file.read_bytes()), **{argument: default}, pre_processor=sharp)
    assert (loaded.hparams[argument], loaded.input_size) == (default, (128, 128))
    assert f"was given {default!r}: that counts" in caplog.text
    assert "pre_processor.transform=" in caplog.text

    caplog.clear()
    small_engine(tmp_path).export(given, ExportType.TORCH, export_root=tmp_path, ckpt_path=file)
    assert f"was given {default!r}: that counts" in caplog.text
    exported = torch.load(tmp_path / "weights/torch/model.pt", weights_only=False)["model"]
    assert exported.post_processor.image_sensitivity == 0.4

    with pytest.raises(ValueError, match=r"backbone is 'resnet18' here, and 'test_resnet' there.*--model\.backbone"):
        scores(plain_model(name, backbone="resnet18"), file, tile_root, tmp_path)
    with pytest.raises(ValueError, match="backbone is 'resnet18' here, and 'test_resnet' there"):
        type(model).load_from_checkpoint(file, backbone="resnet18")


def test_a_resumed_training_takes_the_checkpoints_arguments_too(
    trained: Any, tile_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, file = trained
    resumed = small_model(model.name, learning_rate=0.001)
    small_engine(tmp_path, max_epochs=3).fit(resumed, datamodule=make_tiles(tile_root), ckpt_path=file)
    for argument in TRAINING[model.name].keys() - {"learning_rate"}:
        assert f"trained with {argument}=" in caplog.text
        assert resumed.hparams[argument] == model.hparams[argument]
    assert "trained with learning_rate=0.01, and this" in caplog.text
    (schedule,) = resumed.trainer.lr_scheduler_configs
    assert schedule.scheduler.base_lrs == pytest.approx([0.001] * len(schedule.scheduler.base_lrs))
    assert resumed.trainer.optimizers[0].param_groups[-1]["lr"] <= 0.001


def test_checkpoints_are_taken_as_files_and_paths(trained: Any, tiles: Folder, tmp_path: Path) -> None:
    model, file = trained
    if model.name != "FractalAD":  # the same code
        return
    with file.open("rb") as opened:
        for source in (file, str(file), opened, io.BytesIO(file.read_bytes()), f"file://{file}"):
            assert_same_weights(type(model).load_from_checkpoint(source), model)
    with pytest.raises(ValueError, match=r"the checkpoint in the file object is damaged"):
        type(model).load_from_checkpoint(io.BytesIO(file.read_bytes()[:-999]))
    with pytest.raises(FileNotFoundError, match=r"takes ckpt_path='best' for the name of a file.*best_model_path"):
        small_engine(tmp_path).test(model, datamodule=tiles, ckpt_path="best")


def test_arguments_are_given_by_python_command_line_or_config_file(tmp_path: Path) -> None:
    small = {"backbone": "test_resnet", "pre_trained": False}
    assert anomalib_fractalad.FractalAD("test_resnet", pre_trained=False, score="mean").given_arguments == {
        *small,
        "score",
    }
    assert get_model("AAND", **small).given_arguments == set(small)

    class Derived(anomalib_fractalad.FractalAD):
        def __init__(self, score: str = "top", size: int = 3) -> None:  # noqa: ARG002
            super().__init__("test_resnet", pre_trained=False, score=score)

    assert Derived(size=4).given_arguments == {"size", "backbone", "pre_trained"}

    config = tmp_path / "config.yaml"
    config.write_text("model:\n  class_path: FractalAD\n  init_args: {top_share: 0.005, pre_trained: false}\n")
    arguments = ("--config", str(config), "--model.backbone=test_resnet", "--model.score", "mean")
    program = AnomalibCLI(["fit", *arguments, "--model.learning_rate", "0.5"], run=False)
    given = {"top_share", "pre_trained", "backbone", "score", "learning_rate"}
    assert program.model.given_arguments == given
    assert program.model.hparams.position_margin == 0.1
    assert set(_names_in(["--model", '{"class_path": "AAND", "init_args": {"split": [0, 1]}}'])) == {"split"}
    assert set(_names_in(["--model.init_args", "{score: top}", "--model.init_args.strides=[4, 8]"])) == {
        *("score", "strides"),
    }


def test_a_component_that_the_checkpoint_lacks_works_no_longer(tiles: Folder, tmp_path: Path) -> None:
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(small_model("FractalAD", pre_processor=False), datamodule=tiles)
    other = small_model("FractalAD", pre_processor=True)
    (batch, *_) = small_engine(tmp_path).predict(other, datamodule=tiles, ckpt_path=engine.best_model_path)
    assert other.pre_processor is None
    assert batch.image.shape[-2:] == (64, 64)


def test_a_checkpoint_of_the_earlier_layout_is_resumed_from(tile_root: Path, tmp_path: Path) -> None:
    unbroken = train(tmp_path / "unbroken", tile_root, 3)
    train(tmp_path / "broken", tile_root, 3, Interrupt(5, RuntimeError("away")))
    (file,) = (tmp_path / "broken").rglob("*.ckpt")
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["random_states"] = checkpoint["callbacks"].pop("ExactResume")["random_states"]
    torch.save(checkpoint, file)
    assert_same_weights(unbroken, train(tmp_path / "on", tile_root, 3, checkpoint=file))
