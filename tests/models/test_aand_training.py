# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.callbacks.checkpoint import ModelCheckpoint
from anomalib.data import Folder
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.pre_processing import PreProcessor
from conftest import make_tiles, save, small_engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torchvision.transforms.v2 import Resize

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.loss import PlainDistillationLoss
from anomalib_fractalad.models.aand.stages import Stage
from anomalib_fractalad.models.aand.student import SmallStudent

CONFIGS = Path(__file__).parents[2] / "configs"


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


def test_optimiser_settings() -> None:
    model = small_model()
    optimizer = model.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.Adam
    assert all(group["lr"] == 0.005 and group["betas"] == (0.5, 0.999) for group in optimizer.param_groups)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["amplification", "distillation"]
    trained = sum(len(group["params"]) for group in optimizer.param_groups)
    assert trained == sum(parameter.requires_grad for parameter in model.parameters())


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


def parts_with_gradient(model: AAND) -> set[str]:
    parts = set()
    for name, parameter in model.model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            part, _, rest = name.partition(".")
            parts.add(rest.split(".")[1] if part == "amplifiers" else part)
    return parts


@pytest.mark.parametrize(("loss", "part"), [("focal", "gate"), ("amplification", "residual")])
def test_each_loss_of_stage_one_moves_its_own_part(loss: str, part: str) -> None:
    model = small_model(anomaly_generator="FractalAnomalyGenerator").train()
    statistics = {name: value.clone() for name, value in model.model.named_buffers()}
    model._amplify(torch.rand(2, 3, 64, 64))[loss].backward()
    assert parts_with_gradient(model) == {part}
    trained = [amplifier.get_submodule(part) for amplifier in model.model.amplifiers]
    assert all(parameter.grad.any() for module in trained for parameter in module.parameters())
    assert all(torch.equal(value, statistics[name]) for name, value in model.model.named_buffers())


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18"])
def test_the_loss_of_stage_two_moves_bottleneck_and_decoder(backbone: str) -> None:
    model = small_model(backbone=backbone).train()
    statistics = {name: value.clone() for name, value in model.model.named_buffers()}
    model._distil(torch.rand(2, 3, 64, 64))["distillation"].backward()
    assert parts_with_gradient(model) == {"student"}
    assert all(parameter.grad is not None for parameter in model.model.student.parameters())
    changed = {name for name, value in model.model.named_buffers() if not torch.equal(value, statistics[name])}
    assert {name.partition(".")[0] for name in changed} == {"student"}


def test_stage_one_in_one_piece() -> None:
    """The loss of drawn positions, all of them, against the whole maps with the true mask as the gate."""
    model = small_model().train()
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, :, 16:48, 8:40] = 1
    images = torch.rand(2, 3, 64, 64)
    model.generator = lambda batch: (batch * (1 - mask), mask)
    expected = 0.0
    for amplifier, features in zip(model.model.amplifiers, model.model.teacher(images * (1 - mask)), strict=True):
        gate = (torch.nn.functional.adaptive_avg_pool2d(mask, features.shape[-2:]) > 0.3).float()
        advanced = features + gate * amplifier.residual(features)
        plain, moved = (f.movedim(1, -1).flatten(0, -2) for f in (features, advanced))
        anomalous = gate.flatten() > 0
        cosine = torch.nn.functional.cosine_similarity
        before = cosine(plain[~anomalous][:, None], plain[anomalous][None], dim=-1)
        after = cosine(plain[~anomalous][:, None], moved[anomalous][None], dim=-1)
        expected += 0.1 * (after - before + 0.3).relu().mean()
    torch.testing.assert_close(model._amplify(images)["amplification"], expected)


def test_object_mode_keeps_anomalies_and_comparisons_on_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        "anomalib_fractalad.models.aand.amplification.draw_positions",
        lambda features, where, count: (seen.append(where), features.movedim(1, -1)[where.squeeze(1)][:count])[1],
    )
    images = torch.zeros(1, 3, 64, 64)
    images[..., 32:] = 0.8
    model = small_model(object_mode=True)
    model.generator = lambda batch: (torch.ones_like(batch), torch.ones_like(batch[:, :1]))
    model._amplify(images)
    for normal, anomalous in zip(seen[::2], seen[1::2], strict=True):
        width = normal.shape[-1]
        assert not normal.any()
        assert not anomalous[..., : width // 2 - width // 8].any()
        assert anomalous[..., width // 2 + width // 8 :].all()


def test_a_batch_without_anomalies_trains_the_gate_alone(tmp_path: Path, tiles: Folder) -> None:
    generator = PerlinAnomalyGenerator(probability=0.0)
    watcher, model = watch(tmp_path, tiles, {"max_epochs": 2}, anomaly_generator=generator)
    assert watcher.moved[0] == {"amplifiers"}
    prediction(model)


def test_the_default_generator_is_that_of_the_paper() -> None:
    generator = small_model().generator.spec
    assert generator["class_path"] == "PerlinAnomalyGenerator"
    assert generator["init_args"]["probability"] == 0.8
    assert generator["init_args"]["blend_factor"] == (0.2, 1.0)


def test_textures_reach_the_generator(tmp_path: Path, tiles: Folder) -> None:
    save(torch.full((64, 64), 200).numpy(), tmp_path / "textures" / "grey.png")
    model = small_model(anomaly_source_path=tmp_path / "textures")
    assert model.generator.spec["init_args"]["anomaly_source_path"] == str(tmp_path / "textures")
    small_engine(tmp_path, fast_dev_run=2).fit(model, datamodule=tiles)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be above 0 and a whole number"),
        ({"amplifier_width": True}, "amplifier_width is True; it must be above 0 and a whole number"),
        ({"strides": (4.0, 8.0)}, r"strides is \(4.0, 8.0\)"),
        ({"top_share": math.inf}, "top_share is inf"),
        ({"split": (math.nan, 1)}, r"split is \(nan, 1\).*finite"),
        ({"split": (1, math.inf)}, r"split is \(1, inf\).*finite"),
        ({"split": (1, 0)}, r"split is \(1, 0\).*stage II's above 0"),
        ({"split": (-1, 1)}, r"split is \(-1, 1\)"),
        ({"split": (1, 1, 1)}, r"split is \(1, 1, 1\)"),
        ({"anomaly_generator": "Nothing"}, "Nothing"),
        ({"score": "median"}, "'median'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


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


def test_the_published_settings_are_the_defaults() -> None:
    config = yaml.safe_load((CONFIGS / "aand.yaml").read_text())
    arguments = config["model"]["init_args"]
    defaults = {name: parameter.default for name, parameter in inspect.signature(AAND).parameters.items()}
    assert {**arguments, "split": tuple(arguments["split"])} == {name: defaults[name] for name in arguments}
    assert config["trainer"]["max_epochs"] == sum(arguments["split"])


def test_bfloat16_trains_both_stages(tmp_path: Path, tiles: Folder) -> None:
    _, model = watch(tmp_path, tiles, {"max_epochs": 2, "precision": "bf16-mixed"})
    assert all(parameter.isfinite().all() for parameter in model.model.parameters())
    prediction(model)


def test_choices_of_the_network_reach_it() -> None:
    model = small_model(amplifier_width=5, strides=[8, 16], alignment="centers", fine_embedding=True, split=(1, 1))
    assert [amplifier.gate.query[0].out_channels for amplifier in model.model.amplifiers] == [5, 5]
    assert [upsample.stride for upsample in model.model.upsample] == [8, 16]
    assert isinstance(model.model.student, SmallStudent)
    assert model.model.student.embed[0][0].stride == (1, 1)
    assert (model.hparams["amplifier_width"], model.hparams["fine_embedding"]) == (5, True)


def test_older_checkpoints_and_configs_are_understood() -> None:
    model = small_model(alignment="centres", strides=(8, 16))
    assert model.hparams["alignment"] == "centers"
    assert [upsample.stride for upsample in model.model.upsample] == [8, 16]
    state = {name.replace(".residual.", ".generator."): value for name, value in model.state_dict().items()}
    assert any(".generator." in name for name in state)
    loaded = small_model(alignment="centers", strides=(8, 16))
    loaded.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(loaded.model.eval()(images).anomaly_map, model.model.eval()(images).anomaly_map)
