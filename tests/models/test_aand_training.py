# SPDX-License-Identifier: Apache-2.0
import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import Folder
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.pre_processing import PreProcessor
from conftest import make_tiles, small_engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torchvision.transforms.v2 import Resize

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.loss import PlainDistillationLoss
from anomalib_fractalad.models.aand.stages import Stage


def small_model(**arguments: Any) -> AAND:
    defaults = {
        "backbone": "test_resnet",
        "pre_trained": False,
        "pre_processor": PreProcessor(Resize((64, 64))),
        "visualizer": False,
    }
    return AAND(**{**defaults, **arguments})


class Watch(Callback):
    """After every step: the stage, the rates, and which parts of the model have changed by it."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.rates: list[list[float]] = []
        self.moved: list[set[str]] = []

    def on_train_batch_start(self, trainer: Any, model: AAND, *_: Any) -> None:
        self.before = copy.deepcopy(model.model.state_dict())
        self.stages.append(model.stage)
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer: Any, model: AAND, *_: Any) -> None:
        del trainer
        after = model.model.state_dict()
        self.moved.append({name.partition(".")[0] for name in after if not torch.equal(after[name], self.before[name])})


def watch(root: Path, datamodule: Folder, trainer: dict[str, Any], **arguments: Any) -> tuple[Watch, AAND]:
    watcher, model = Watch(), small_model(**arguments)
    small_engine(root, callbacks=[watcher], limit_val_batches=0, **trainer).fit(model, datamodule=datamodule)
    return watcher, model


def prediction(model: AAND) -> torch.Tensor:
    maps = model.model.eval()(torch.rand(1, 3, 64, 64)).anomaly_map
    assert maps.isfinite().all()
    return maps


@pytest.mark.parametrize(
    ("trainer", "arguments", "stages"),
    [
        ({"max_epochs": 1}, {}, [1, 2]),
        ({"max_epochs": 2}, {}, [1, 1, 2, 2]),
        ({"max_epochs": 3}, {"split": (2, 1)}, [1, 1, 1, 1, 2, 2]),
        ({"max_epochs": 2}, {"split": (0, 1)}, [2, 2, 2, 2]),
        ({}, {"epochs": 2}, [1, 1, 2, 2]),
        ({"max_steps": 5}, {}, [1, 1, 2, 2, 2]),
        ({"max_steps": 1}, {}, [2]),
        ({"max_epochs": 4, "max_steps": 3}, {}, [1, 2, 2]),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, {}, [1, 1, 2, 2]),
        ({"fast_dev_run": True}, {}, [2]),
        ({"fast_dev_run": 2}, {}, [1, 2]),
    ],
    ids=str,
)
def test_both_stages_in_one_fit(
    tmp_path: Path,
    tiles: Folder,
    trainer: dict[str, Any],
    arguments: dict[str, Any],
    stages: list[int],
) -> None:
    watcher, model = watch(tmp_path, tiles, trainer, **arguments)
    assert watcher.stages == stages
    assert prediction(model).shape == (1, 1, 64, 64)


def test_each_stage_moves_its_own_part(tmp_path: Path, tiles: Folder) -> None:
    watcher, _ = watch(tmp_path, tiles, {"max_epochs": 3})
    moved = {1: {"amplifiers"}, 2: {"student"}}
    assert watcher.moved == [moved[stage] for stage in watcher.stages]


def test_gradients_of_zero_do_not_move_the_idle_stage(tmp_path: Path, tiles: Folder) -> None:
    """Distributed training gives such gradients; Adam would go on with the moments of stage I."""

    class Zeros(Watch):
        def on_after_backward(self, trainer: Any, model: AAND) -> None:
            del trainer
            for parameter in model.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    watcher = Zeros()
    small_engine(tmp_path, callbacks=[watcher], limit_val_batches=0, max_epochs=2).fit(small_model(), datamodule=tiles)
    moved = {1: {"amplifiers"}, 2: {"student"}}
    assert watcher.moved == [moved[stage] for stage in watcher.stages]


def test_plain_reverse_distillation_moves_the_student(tmp_path: Path, tiles: Folder) -> None:
    watcher, model = watch(tmp_path, tiles, {"max_epochs": 1}, split=(0, 1), hard_distillation=False)
    assert watcher.moved == [{"student"}, {"student"}]
    assert not list(model.model.amplifiers.parameters())


def test_idle_weights_get_no_moments(tmp_path: Path, tiles: Folder) -> None:
    _, model = watch(tmp_path, tiles, {"max_epochs": 2})
    optimizer = model.optimizers().optimizer
    steps = {
        group["name"]: {optimizer.state[p]["step"].item() for p in group["params"]} for group in optimizer.param_groups
    }
    assert steps == {"amplification": {2}, "distillation": {2}}


def test_each_stage_starts_its_own_schedule(tmp_path: Path, tiles: Folder) -> None:
    watcher, _ = watch(tmp_path, tiles, {"max_epochs": 10}, split=(1, 1), learning_rate=0.1)
    first = [rates[0] for rates in watcher.rates[:10]]
    second = [rates[1] for rates in watcher.rates]
    assert first == pytest.approx([0.1] * 8 + [0.02, 0.004])
    assert second == pytest.approx([0.1] * 18 + [0.02, 0.004])


def test_learning_rates_of_both_stages_can_be_monitored(tmp_path: Path, tiles: Folder) -> None:
    monitor = LearningRateMonitor()
    engine = small_engine(tmp_path, max_epochs=1, callbacks=[monitor], logger=True, limit_val_batches=0)
    engine.fit(small_model(), datamodule=tiles)
    assert sorted(monitor.lrs) == ["lr-Adam/amplification", "lr-Adam/distillation"]


def test_the_log_and_the_progress_bar_say_which_stage_runs(
    tmp_path: Path,
    tiles: Folder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown: list[dict[str, float]] = []

    class Record(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            shown.append(dict(trainer.progress_bar_metrics))

    engine = small_engine(tmp_path, max_epochs=2, callbacks=[Record()], limit_val_batches=0)
    with caplog.at_level(logging.INFO):
        engine.fit(small_model(), datamodule=tiles)
    assert "AAND stage 1 of 2, amplification: steps 1 to 2" in caplog.text
    assert "AAND stage 2 of 2, distillation: steps 3 to 4" in caplog.text
    first, second = shown
    assert first.keys() == {"stage", "train_loss", "train_focal", "train_amplification"}
    assert first["stage"] == 1
    assert first["train_loss"] == pytest.approx(first["train_focal"] + first["train_amplification"])
    assert second["stage"] == 2
    assert second["train_loss"] == second["train_distillation"]


def checkpoints(root: Path, **when: int) -> ModelCheckpoint:
    return ModelCheckpoint(root, "{step}", save_top_k=-1, auto_insert_metric_name=False, **when)


def test_resumed_trainings_end_with_the_same_weights(tmp_path: Path, tile_root: Path) -> None:
    seed_everything(1)
    unbroken = small_model()
    trainer = {"max_epochs": 4, "callbacks": [checkpoints(tmp_path, every_n_epochs=1)]}
    small_engine(tmp_path, **trainer).fit(unbroken, datamodule=make_tiles(tile_root))
    stages = [1, 1, 1, 1, 2, 2, 2, 2]
    for step in (2, 4, 6):  # within stage I, between the stages, within stage II
        seed_everything(99)
        watcher, resumed = Watch(), small_model()
        small_engine(tmp_path / "resumed", max_epochs=4, callbacks=[watcher]).fit(
            resumed,
            datamodule=make_tiles(tile_root),
            ckpt_path=tmp_path / f"{step}.ckpt",
        )
        assert watcher.stages == stages[step:]
        for (name, ours), theirs in zip(
            resumed.model.state_dict().items(),
            unbroken.model.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(ours, theirs), f"{name}, resumed after step {step}"


def test_a_training_resumes_at_the_right_step_within_an_epoch(tmp_path: Path, tile_root: Path) -> None:
    callbacks = [checkpoints(tmp_path, every_n_train_steps=1)]
    small_engine(tmp_path, max_epochs=1, callbacks=callbacks).fit(small_model(), datamodule=make_tiles(tile_root))
    watcher = Watch()
    small_engine(tmp_path / "resumed", max_epochs=1, callbacks=[watcher]).fit(
        small_model(),
        datamodule=make_tiles(tile_root),
        ckpt_path=tmp_path / "1.ckpt",
    )
    assert watcher.stages == [2]
    assert watcher.moved == [{"student"}]


def test_a_batch_without_anomalies_trains_the_gate_alone(tmp_path: Path, tiles: Folder) -> None:
    generator = PerlinAnomalyGenerator(probability=0.0)
    watcher, model = watch(tmp_path, tiles, {"max_epochs": 2}, anomaly_generator=generator)
    assert watcher.moved[0] == {"amplifiers"}
    prediction(model)


def test_a_training_without_an_end_is_refused(tmp_path: Path, tiles: Folder) -> None:
    with pytest.raises(ValueError, match=r"max_epochs is -1.*set max_epochs or max_steps"):
        small_engine(tmp_path, max_epochs=-1).fit(small_model(), datamodule=tiles)


def test_default_metrics_and_a_checkpoint_that_is_plain_data(tmp_path: Path, tiles: Folder) -> None:
    model = small_model(split=(1, 3), score="top", top_share=0.1, hard_distillation=False)
    (metrics,) = small_engine(tmp_path, max_epochs=2).train(model, datamodule=tiles)
    assert set(metrics) == {
        "image_AUROC",
        "image_F1Score",
        "pixel_AUROC",
        "pixel_F1Score",
        "pixel_AUPR",
        "pixel_AUPRO",
    }
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = AAND.load_from_checkpoint(checkpoint, visualizer=False)
    assert loaded.split == (1, 3)
    assert loaded.model.score.top_share == 0.1
    assert type(loaded.distillation_loss) is PlainDistillationLoss
    image = torch.rand(1, 3, 50, 80)
    torch.testing.assert_close(loaded.eval()(image).anomaly_map, model.eval()(image).anomaly_map)


def test_bfloat16_trains_both_stages(tmp_path: Path, tiles: Folder) -> None:
    _, model = watch(tmp_path, tiles, {"max_epochs": 2, "precision": "bf16-mixed"})
    assert all(parameter.isfinite().all() for parameter in model.model.parameters())
    prediction(model)
