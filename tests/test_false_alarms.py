# SPDX-License-Identifier: Apache-2.0
"""Thresholds by split conformal calibration."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from conftest import FLOAT32, in_onnx_runtime, make_tiles, small_engine, small_model, tile_arguments
from openvino import Core
from torchvision.transforms.v2 import Resize

from anomalib_fractalad import FalseAlarmThreshold, FractalAD
from anomalib_fractalad.post_processing.false_alarms import conformal_rank, images_needed, smallest_rate, upper_bound

TRAINER = SimpleNamespace(is_global_zero=True)
NAN = float("nan")


def validate(post_processor: FalseAlarmThreshold, good: torch.Tensor, bad: torch.Tensor | None = None) -> None:
    """Validate with images whose maps hold their score and lower values, good and bad ones in one batch and another."""
    bad = torch.empty(0) if bad is None else bad
    scores, labels = torch.cat([good, bad]), torch.cat([torch.zeros(len(good)), torch.ones(len(bad))]).bool()
    order = torch.randperm(len(scores))
    post_processor.on_validation_start(TRAINER, None)
    for part in order.split(7):
        maps = scores[part, None, None] * torch.linspace(0.1, 1, 100).reshape(1, 10, 10)
        batch = ImageBatch(
            image=torch.zeros(len(part), 3, 10, 10), pred_score=scores[part], anomaly_map=maps, gt_label=labels[part]
        )
        post_processor.on_validation_batch_end(TRAINER, None, batch)
    post_processor.on_validation_epoch_end(TRAINER, None)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (60, 0.05), (99, 0.01), (9, 0.1), (10, 0.5)])
def test_the_promise_holds(count: int, rate: float) -> None:
    """Of uniform scores, the share above a threshold is 1 minus the threshold."""
    rank = conformal_rank(count, rate)
    thresholds = np.sort(np.random.default_rng(0).random((20_000, count)), axis=1)[:, rank - 1]
    expected = (count + 1 - rank) / (count + 1)
    assert expected <= rate + 1e-12
    assert (count + 2 - rank) / (count + 1) > rate  # the next lower score would break it
    assert np.mean(1 - thresholds) == pytest.approx(expected, abs=3e-3)
    assert np.mean(1 - thresholds <= upper_bound(count, rank)) == pytest.approx(0.95, abs=6e-3)


@pytest.mark.parametrize("rate", [0.3, 0.1, 0.05, 0.01, 0.003])
def test_the_number_of_images_that_it_takes(rate: float) -> None:
    needed = images_needed(rate)
    assert conformal_rank(needed, rate) <= needed
    assert smallest_rate(needed) <= rate * (1 + 1e-9)
    if needed > 1:
        assert conformal_rank(needed - 1, rate) > needed - 1


def test_bad_images_move_no_threshold() -> None:
    good, bad = torch.rand(50), 0.5 + torch.rand(20)
    post_processor = FalseAlarmThreshold(0.1, pixel_false_alarms=0.02)
    validate(post_processor, good)
    assert post_processor.image_threshold == good.sort().values[math.ceil(51 * 0.9) - 1]
    images, pixels = post_processor.image_threshold.clone(), post_processor.pixel_threshold.clone()
    values = (good[:, None] * torch.linspace(0.1, 1, 100)).flatten().sort().values
    assert values[4900 - 1] <= pixels <= 1.002 * values[4901 - 1]
    assert (values > pixels).float().mean() <= 0.02
    validate(post_processor, good, bad)
    assert post_processor.image_threshold == images
    assert post_processor.pixel_threshold == pixels
    assert post_processor.calibration["images"] == 50
    assert post_processor.calibration["pixels"] == 5000
    assert "at most 0.1 raise an alarm" in post_processor.report()
    # The order is kept, and the threshold lies at 0.5: the image that it comes from raises no alarm.
    everything = torch.cat([good, bad]).sort().values
    found = post_processor(InferenceBatch(pred_score=everything, anomaly_map=everything.reshape(1, 1, 7, 10)))
    assert torch.equal(found.pred_label, everything > images)
    assert (found.pred_score.diff() > 0).all()
    assert torch.equal(found.pred_mask.flatten(), everything > pixels)
    # A sensitivity moves what normalized scores are compared with.
    post_processor.image_sensitivity = 0.7
    bold = post_processor(InferenceBatch(pred_score=everything, anomaly_map=None))
    assert torch.equal(bold.pred_label, found.pred_score > torch.tensor(1.0) - 0.7)


def test_manual_thresholds() -> None:
    post_processor = FalseAlarmThreshold(0.001, image_threshold=0.25, pixel_threshold=0.75)
    assert post_processor.image_threshold == 0.25
    validate(post_processor, torch.rand(5))  # too few for the rate, which does not count
    assert (post_processor.image_threshold, post_processor.pixel_threshold) == (0.25, 0.75)
    assert "set by hand" in post_processor.report()
    with pytest.raises(ValueError, match="image_threshold is nan"):
        FalseAlarmThreshold(image_threshold=NAN)
    for rate in (0.0, 1.0, NAN):
        with pytest.raises(ValueError, match=f"false_alarms is {rate}; it must be above 0 and below 1"):
            FalseAlarmThreshold(rate)


def test_too_few_images_are_refused_with_the_rate_that_is_possible() -> None:
    message = (
        r"0\.01, and validation has 30 good image\(s\): the smallest rate possible with them is 0\.03226\. Give at"
    )
    with pytest.raises(ValueError, match=message + " least 99 good validation images"):
        validate(FalseAlarmThreshold(0.01), torch.rand(30), torch.rand(80))
    with pytest.raises(ValueError, match="has 0 good image"):
        validate(FalseAlarmThreshold(0.5), torch.empty(0), torch.rand(8))
    with pytest.raises(ValueError, match=r"pixel_false_alarms is 0\.0001, .* have 500 pixels"):
        validate(FalseAlarmThreshold(0.5, pixel_false_alarms=0.0001), torch.rand(5))
    trial = SimpleNamespace(is_global_zero=True, sanity_checking=True)
    post_processor = FalseAlarmThreshold(0.01)
    post_processor.on_validation_start(trial, None)
    post_processor.on_validation_epoch_end(trial, None)


@pytest.mark.slow
def test_with_other_models(tile_root: Path, tmp_path: Path) -> None:
    """Patchcore: refused before training with too few images; calibrated, exported, and kept in checkpoints."""

    def patchcore(rate: float) -> Patchcore:
        return Patchcore(
            backbone="test_resnet",
            layers=["layer1"],
            pre_trained=False,
            coreset_sampling_ratio=0.02,
            num_neighbors=1,
            visualizer=False,
            pre_processor=PreProcessor(Resize((64, 64), antialias=True)),
            post_processor=FalseAlarmThreshold(rate),
        )

    engine = small_engine(tmp_path)
    model = patchcore(0.1)
    with pytest.raises(ValueError, match=r"validation has 4 good image\(s\): the smallest rate .* is 0\.2\."):
        engine.fit(model, datamodule=make_tiles(tile_root))
    model, engine = patchcore(0.2), small_engine(tmp_path)
    engine.fit(model, datamodule=make_tiles(tile_root))
    calibration = model.post_processor.calibration
    assert calibration["images"] == 4
    predictions = engine.predict(model, data_path=tile_root / "test/good")
    scores = torch.cat([batch.pred_score for batch in predictions]).sort().values
    assert scores[-1].item() == pytest.approx(0.5, abs=1e-3)  # in batches of another size, it is rounded otherwise
    assert scores[-2] < 0.5
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        expected = model(images)
    file = model.to_openvino(tmp_path, input_size=(64, 64))
    found = Core().compile_model(file, "CPU", FLOAT32)(images.numpy())
    assert np.array_equal(found["pred_label"].ravel(), expected.pred_label.numpy().ravel())
    np.testing.assert_allclose(found["pred_score"].ravel(), expected.pred_score.ravel(), atol=2e-3)
    onnx = in_onnx_runtime(model.to_onnx(tmp_path, input_size=(64, 64)), images)
    assert np.array_equal(onnx.pred_label.ravel(), expected.pred_label.numpy().ravel())
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Patchcore.load_from_checkpoint(tmp_path / "model.ckpt", post_processor=FalseAlarmThreshold())
    assert loaded.post_processor.calibration == calibration
    assert loaded.post_processor.false_alarms == 0.2


def test_own_checkpoints_keep_the_promise(tmp_path: Path, tile_root: Path) -> None:
    model = small_model("FractalAD", post_processor=FalseAlarmThreshold(0.3, pixel_threshold=0.9))
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=make_tiles(tile_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = FractalAD.load_from_checkpoint(tmp_path / "model.ckpt").post_processor
    assert isinstance(loaded, FalseAlarmThreshold)
    assert loaded.calibration == model.post_processor.calibration
    assert loaded.image_threshold == model.post_processor.image_threshold
    assert loaded.pixel_threshold == pytest.approx(0.9)
    # An engine takes it over, too, and its tests decide by it.
    fresh = small_model("FractalAD")
    small_engine(tmp_path).test(fresh, datamodule=make_tiles(tile_root), ckpt_path=tmp_path / "model.ckpt")
    assert isinstance(fresh.post_processor, FalseAlarmThreshold)


@pytest.mark.parametrize("name", ["Patchcore", "FractalAD"])
def test_the_program_takes_it(name: str, tile_root: Path, tmp_path: Path) -> None:
    def arguments(prefix: str, values: dict[str, Any]) -> list[str]:
        return [text for key, value in values.items() for text in (f"--{prefix}.{key}", str(value))]

    program = AnomalibCLI(
        [
            *("train", "--model", name, "--data", "Folder", *arguments("data", tile_arguments(tile_root))),
            *("--model.post_processor", "anomalib_fractalad.FalseAlarmThreshold"),
            *("--model.post_processor.init_args.false_alarms", "0.2", "--default_root_dir", str(tmp_path)),
            *("--model.pre_trained", "false", "--model.backbone", "test_resnet"),
        ],
        run=False,
    )
    assert type(program.model.post_processor) is FalseAlarmThreshold
    assert program.model.post_processor.false_alarms == 0.2
