# SPDX-License-Identifier: Apache-2.0
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import Folder
from anomalib.pre_processing import PreProcessor
from conftest import assert_same_weights, make_tiles, small_engine
from lightning import Callback, Trainer, seed_everything
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_fractalad import FractalAD


def small_model(**arguments: Any) -> FractalAD:
    defaults = {
        "backbone": "test_resnet",
        "pre_trained": False,
        "pre_processor": PreProcessor(Resize((64, 64))),
        "visualizer": False,
    }
    return FractalAD(**{**defaults, **arguments})


def train(root: Path, datamodule: Folder, *, max_epochs: int = 2, seed: int = 1, **arguments: Any) -> FractalAD:
    seed_everything(seed)
    model = small_model(**arguments)
    small_engine(root, max_epochs=max_epochs).fit(model, datamodule=datamodule)
    return model


def test_losses_are_logged_under_their_names(tmp_path: Path, tiles: Folder) -> None:
    model = small_model()
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=tiles)
    parts = ("train_bce", "train_dice", "train_distillation")
    metrics = engine.trainer.callback_metrics
    assert {"train_loss", *parts} <= metrics.keys()
    assert {"train_loss", *parts} <= engine.trainer.progress_bar_metrics.keys()
    torch.testing.assert_close(metrics["train_loss"], sum(metrics[part] for part in parts))


def test_without_distillation_there_is_no_student(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path, max_epochs=1)
    model = small_model(distillation=False)
    engine.fit(model, datamodule=tiles)
    assert model.model.student is None
    assert "train_distillation" not in engine.trainer.callback_metrics


def test_default_metrics(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path, max_epochs=1)
    (metrics,) = engine.train(small_model(), datamodule=tiles)
    assert set(metrics) == {
        "image_AUROC",
        "image_F1Score",
        "pixel_AUROC",
        "pixel_F1Score",
        "pixel_AUPR",
        "pixel_AUPRO",
    }


def test_data_without_masks_are_evaluated_by_image(tmp_path: Path, tile_root: Path) -> None:
    tiles = make_tiles(tile_root)
    tiles.mask_dir = None
    (metrics,) = small_engine(tmp_path, max_epochs=1).train(small_model(), datamodule=tiles)
    assert set(metrics) == {"image_AUROC", "image_F1Score"}


@pytest.mark.parametrize(
    ("arguments", "decay"),
    [({}, 1e-3), ({"distillation": False}, 1e-2), ({"weight_decay": 0.5}, 0.5), ({"weight_decay": 0.0}, 0.0)],
)
def test_optimizer_settings(arguments: dict[str, Any], decay: float) -> None:
    model = small_model(learning_rate=0.02, **arguments)
    (group,) = model.configure_optimizers().param_groups
    assert group["lr"] == 0.02
    assert group["weight_decay"] == decay
    frozen = set(map(id, model.model.teacher.parameters()))
    assert not frozen & set(map(id, group["params"]))
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in model.parameters())


class LearningRates(Callback):
    """Notes the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 6}])
def test_cosine_decay_takes_the_learning_rate_to_0(tmp_path: Path, tiles: Folder, length: dict[str, int]) -> None:
    noted = LearningRates()
    engine = small_engine(tmp_path, callbacks=[noted], **length)
    engine.fit(small_model(cosine_decay=True, learning_rate=0.02), datamodule=tiles)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    schedule = CosineAnnealingLR(optimizer, 6)
    expected = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        expected += schedule.get_last_lr()
    assert noted.rates == pytest.approx(expected, abs=1e-9)


def test_cosine_decay_needs_an_end(tmp_path: Path, tiles: Folder) -> None:
    with pytest.raises(ValueError, match="set the trainer's max_epochs or max_steps"):
        small_engine(tmp_path, max_epochs=-1).fit(small_model(cosine_decay=True), datamodule=tiles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be above 0 and a whole number"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"epochs": True}, "epochs is True"),
        ({"top_share": math.nan}, "top_share is nan"),
        ({"top_share": True}, "top_share is True"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


def test_object_mode_reaches_the_generator() -> None:
    assert small_model(object_mode=True).generator.object_mode
    assert not small_model().generator.object_mode


def test_position_margin_reaches_the_generator() -> None:
    assert small_model().generator.position_margin == 0.1
    assert small_model(position_margin=0).generator.position_margin == 0
    for margin in (-0.1, 0.3):
        with pytest.raises(ValueError, match=rf"^position_margin={margin}: must lie in \[0, 0.25\]"):
            small_model(position_margin=margin)


def test_a_normalizing_pre_processor_is_refused(tmp_path: Path, tiles: Folder) -> None:
    transform = Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)])
    with pytest.raises(ValueError, match="pre-processor of FractalAD must not contain Normalize"):
        small_engine(tmp_path, max_epochs=1).fit(small_model(pre_processor=PreProcessor(transform)), datamodule=tiles)


def test_epochs_set_the_training_length(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path)
    engine.fit(small_model(epochs=3), datamodule=tiles)
    assert engine.trainer.current_epoch == 3


def test_left_out_the_trainer_sets_the_training_length(tmp_path: Path, tiles: Folder) -> None:
    engine = small_engine(tmp_path, max_epochs=2)
    engine.fit(small_model(), datamodule=tiles)
    assert engine.trainer.current_epoch == 2


def test_bfloat16_autocast_trains(tmp_path: Path, tiles: Folder) -> None:
    model = small_model()
    engine = small_engine(tmp_path, max_epochs=2, precision="bf16-mixed")
    engine.fit(model, datamodule=tiles)
    assert all(torch.isfinite(value) for value in engine.trainer.callback_metrics.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_another_seed_gives_another_result(tmp_path: Path, tile_root: Path) -> None:
    one = train(tmp_path / "one", make_tiles(tile_root), max_epochs=1, seed=1)
    other = train(tmp_path / "other", make_tiles(tile_root), max_epochs=1, seed=2)
    assert not torch.equal(one.model.head.classify.weight, other.model.head.classify.weight)


def test_lightnings_trial_validation_changes_nothing(tmp_path: Path, tile_root: Path) -> None:
    expected = train(tmp_path, make_tiles(tile_root), max_epochs=1)
    seed_everything(1)
    model = small_model()
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False
    )
    trainer.fit(model, datamodule=make_tiles(tile_root))
    assert_same_weights(expected, model)


@pytest.mark.parametrize("cosine_decay", [False, True])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path, tile_root: Path, cosine_decay: bool) -> None:
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    seed_everything(1)
    unbroken = small_model(cosine_decay=cosine_decay)
    engine = small_engine(tmp_path / "unbroken", max_epochs=3, callbacks=[every_epoch])
    engine.fit(unbroken, datamodule=make_tiles(tile_root))
    torch.manual_seed(99)
    resumed = small_model(cosine_decay=cosine_decay)
    engine = small_engine(tmp_path / "resumed", max_epochs=3)
    engine.fit(resumed, datamodule=make_tiles(tile_root), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same_weights(unbroken, resumed)


def test_a_checkpoint_is_plain_data_and_loads_without_pre_trained_weights(
    tmp_path: Path,
    tiles: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = train(tmp_path, tiles, max_epochs=1, score="top", top_share=0.1)
    model.hparams.pre_trained = True
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = FractalAD.load_from_checkpoint(checkpoint, visualizer=False)
    assert_same_weights(model, loaded)
    assert loaded.model.score.reduction == "top"
    assert loaded.model.score.top_share == 0.1
    image = torch.rand(1, 3, 50, 80)
    torch.testing.assert_close(loaded.eval()(image).anomaly_map, model.eval()(image).anomaly_map)


def test_weights_that_cannot_be_had_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"weights of backbone 'mobilenetv1_100'.*HF_HUB_CACHE.*pre_trained=False"):
        FractalAD(backbone="mobilenetv1_100")


def test_overriding_the_trainers_length_is_said(
    tmp_path: Path,
    tiles: Folder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        small_engine(tmp_path, max_epochs=2).fit(small_model(epochs=1), datamodule=tiles)
    assert "Overriding max_epochs from 2 with 1 for FractalAD" in caplog.text
