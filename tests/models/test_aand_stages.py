# SPDX-License-Identifier: Apache-2.0
"""AAND that is stopped between its stages, and AAND that goes on for longer than planned."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models.components.base.export_mixin import ExportMixin
from conftest import make_tiles, small_engine
from lightning.pytorch.callbacks import EarlyStopping
from test_aand_training import Watch, checkpoints, small_model
from test_all_models import small_model as small_model_of

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.stages import StagePlan
from anomalib_fractalad.registration import MODELS

EPOCHS = 4  # of 2 steps: 4 of stage I, 4 of stage II


@pytest.fixture(scope="module")
def trained(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a whole training after steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    engine = small_engine(folder, max_epochs=EPOCHS, callbacks=[checkpoints(folder, every_n_epochs=1)])
    engine.fit(small_model(), datamodule=make_tiles(tile_root))
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [r.getMessage() for r in caplog.records if r.name.startswith("anomalib_fractalad") and "AAND" in r.message]
    caplog.clear()
    return told


def test_a_training_that_stops_within_stage_one_says_so_wherever_it_is_used(
    tmp_path: Path,
    tile_root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[tuple[Any, ...]] = []
    monkeypatch.setattr(ExportMixin, "to_onnx", lambda _, *arguments, **__: exported.append(arguments))
    caplog.set_level(logging.WARNING)
    tiles, stop = make_tiles(tile_root), EarlyStopping("train_loss", patience=1, min_delta=10.0)
    engine, model = small_engine(tmp_path, max_epochs=10, callbacks=[stop]), small_model()
    engine.fit(model, datamodule=tiles)
    (told,) = warnings_of(caplog)
    assert "ended within stage I, amplification, after step 4 of 10: the student never took a step" in told
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    loaded = AAND.load_from_checkpoint(checkpoint, visualizer=False)
    weights = small_model()
    weights.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    for stopped in (model, loaded, weights):
        engine = small_engine(tmp_path / "again")
        uses = {
            "tested": lambda: engine.test(stopped, datamodule=tiles, verbose=False),  # noqa: B023
            "validated": lambda: engine.validate(stopped, datamodule=tiles, verbose=False),  # noqa: B023
            "asked for predictions": lambda: engine.predict(stopped, datamodule=tiles),  # noqa: B023
            "exported": lambda: stopped.to_torch(tmp_path),  # noqa: B023
        }
        for use, call in uses.items():
            if stopped is model or use in {"tested", "exported"}:
                call()
                assert any(
                    f"AAND is {use}, but" in told and "(distillation)" in told for told in warnings_of(caplog)
                ), use
    loaded.to_onnx(tmp_path, input_size=(64, 64))
    assert exported
    assert "AAND is exported" in warnings_of(caplog)[0]


def test_a_trained_model_is_used_without_a_word(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    contents = torch.load(trained / "8.ckpt", weights_only=True)
    del contents["stage_plan"]  # as in older checkpoints
    torch.save(contents, tmp_path / "older.ckpt")
    for checkpoint in (trained / "6.ckpt", trained / "8.ckpt", tmp_path / "older.ckpt"):
        AAND.load_from_checkpoint(checkpoint, visualizer=False).to_torch(tmp_path)
        assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("step", "epochs", "older", "stages", "factors"),
    [
        # 12 steps of stage II, of which 4 are done: the rate falls after 9.6 and 10.8.
        (8, 8, False, [2] * 8, [1] * 6 + [0.2, 0.04]),
        (8, 8, True, [2] * 8, [1] * 6 + [0.2, 0.04]),
        (6, 8, False, [2] * 10, [1] * 8 + [0.2, 0.04]),
        (4, 8, False, [2] * 12, [1] * 10 + [0.2, 0.04]),
        (2, 8, False, [1] * 6 + [2] * 8, [1] * 13 + [0.2]),
        (2, 2, False, [2] * 2, [1] * 2),
    ],
)
def test_a_training_that_goes_on_for_longer(
    trained: Path,
    tile_root: Path,
    tmp_path: Path,
    step: int,
    epochs: int,
    older: bool,
    stages: list[int],
    factors: list[float],
) -> None:
    contents = torch.load(trained / f"{step}.ckpt", weights_only=True)
    if older:
        del contents["stage_plan"]
    torch.save(contents, tmp_path / "start.ckpt")
    watcher = Watch()
    engine = small_engine(tmp_path, max_epochs=epochs, callbacks=[watcher], limit_val_batches=0)
    engine.fit(small_model(), datamodule=make_tiles(tile_root), ckpt_path=tmp_path / "start.ckpt")
    assert watcher.stages == stages
    assert [rates[1] for rates in watcher.rates] == pytest.approx([0.005 * factor for factor in factors])
    parts = {1: {"amplifiers"}, 2: {"student"}}
    assert watcher.moved == [parts[stage] for stage in stages]


def test_a_model_that_is_trained_anew_starts_with_stage_one(trained: Path, tile_root: Path, tmp_path: Path) -> None:
    watcher, model = Watch(), AAND.load_from_checkpoint(trained / "8.ckpt", visualizer=False)
    assert model.plan == StagePlan(4, 4)
    small_engine(tmp_path, max_epochs=2, callbacks=[watcher], limit_val_batches=0).fit(
        model, datamodule=make_tiles(tile_root)
    )
    assert watcher.stages == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("new", "earlier", "step", "expected"),
    [
        ((10, 12), (5, 6), 11, (5, 17)),
        ((10, 12), (5, 6), 5, (5, 17)),
        ((10, 12), (5, 6), 4, (10, 12)),
        ((10, 12), (10, 12), 10, (10, 12)),
        ((3, 4), (10, 12), 5, (5, 2)),
        ((3, 4), (10, 12), 11, (10, 0)),
        ((10, 12), (0, 1), 1, (10, 12)),  # a training of a single step leaves stage I out
        ((0, 12), (0, 6), 6, (0, 12)),
        ((10, 12), (0, 0), 8, (10, 12)),
    ],
)
def test_plan_after_an_earlier_one(new: tuple, earlier: tuple, step: int, expected: tuple) -> None:
    assert StagePlan(*new).after(StagePlan(*earlier), step) == StagePlan(*expected)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize(("step", "idle"), [(0, "student"), (9, "amplifiers")])
def test_idle_weights_get_gradients_but_never_touch_the_loss(
    broken: float, step: int, idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(anomaly_generator="FractalAnomalyGenerator").train()
    model.plan = StagePlan(5, 5)
    monkeypatch.setattr(AAND, "trainer", SimpleNamespace(world_size=2, global_step=step))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    monkeypatch.setattr(model, "log_losses", lambda loss, *_: loss)
    if idle == "amplifiers":  # they feed the student, so that broken ones would show in its loss
        teacher = [level.detach() for level in model.model.advanced_teacher(torch.rand(4, 3, 64, 64))]
        monkeypatch.setattr(model.model, "advanced_teacher", lambda _: teacher)
    with torch.no_grad():
        next(getattr(model.model, idle).parameters()).fill_(broken)
    loss = model.training_step(ImageBatch(image=torch.rand(4, 3, 64, 64)))
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_never_took_a_step_says_so(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = small_model_of(name)
    model.to_torch(tmp_path)
    assert f"{name} is exported, but its maps and scores mean nothing" in caplog.text
    caplog.clear()
    if name == "FractalMemory":  # takes no steps; its memory is filled
        model.model.memory.owners.fill_(0)
    model.train()
    model.model(torch.rand(2, 3, 64, 64))
    model.to_torch(tmp_path)
    assert "exported" not in caplog.text
