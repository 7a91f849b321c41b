# SPDX-License-Identifier: Apache-2.0
"""The whole command, on tiny data, and the metrics against a second way of computing them."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.models import Padim
from conftest import assert_same_weights, one_program, tile_arguments
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_fractalad import FractalAD
from anomalib_fractalad.benchmark import worker
from anomalib_fractalad.benchmark.__main__ import benchmark
from anomalib_fractalad.benchmark.config import RUNTIMES, Job, Settings, make_jobs
from anomalib_fractalad.benchmark.fit import CannotResumeError, FitMeter, build, fit
from anomalib_fractalad.benchmark.quality import ScoreCollector, defect_auroc, evaluate
from anomalib_fractalad.benchmark.record import Record, is_missing, record_of
from anomalib_fractalad.benchmark.runner import begin, run_in_process
from anomalib_fractalad.benchmark.speed import nothing_clamped

pytestmark = pytest.mark.slow

PADIM = {
    "class_path": "Padim",
    "init_args": {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 8},
}
FRACTALAD = {
    "class_path": "FractalAD",
    "init_args": {"backbone": "test_resnet", "pre_trained": False},
    "epochs": 12,
    "train_batch_size": 2,
    "precision": "bf16-mixed",
}
EFFICIENTAD = {"class_path": "EfficientAd", "steps": 2, "train_batch_size": 1}


def folder(root: Path) -> dict[str, Any]:
    arguments = {**tile_arguments(root), "train_batch_size": 4, "eval_batch_size": 4}
    return {"class_path": "Folder", "init_args": arguments}


def run(output: Path, models: list[Any], root: Path, **arguments: Any) -> Path:
    """The command, its jobs in this process: to import anomalib once for each would take a minute."""
    defaults = {"accelerator": "cpu", "image_size": (64, 64), "threads": 1, "repetitions": 3, "sheet_images": 3}

    def run_here(job: Job, record: Record, *_: Any) -> None:
        begin(job, record)
        worker.main(record.file)
        record.read()

    with pytest.MonkeyPatch.context() as patch, one_program():
        patch.setattr("anomalib_fractalad.benchmark.__main__.run_in_process", run_here)
        return benchmark(models, [folder(root)], output=output, **{**defaults, **arguments})


def read_results(output: Path) -> pd.DataFrame:
    return pd.read_csv(output / "results.csv").set_index("model")


def times_of_change(files: Iterable[Path]) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in files}


class First(NamedTuple):
    output: Path
    results: pd.DataFrame
    checkpoints: dict[Path, int]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, tile_root: Path) -> First:
    """What a call leaves that measures one runtime only."""
    output = tmp_path_factory.mktemp("comparison")
    run(output, [FRACTALAD, PADIM], tile_root, runtimes=["torch"])
    return First(output, read_results(output), times_of_change(output.glob("jobs/*/model.ckpt")))


@pytest.fixture(scope="module")
def output(first: First, tile_root: Path) -> Path:
    """After a second call, with all runtimes and one more model."""
    run(first.output, [FRACTALAD, PADIM, EFFICIENTAD], tile_root)
    return first.output


@pytest.fixture(scope="module")
def results(output: Path) -> pd.DataFrame:
    return read_results(output)


def test_every_job_has_a_row(results: pd.DataFrame) -> None:
    assert list(results.index) == ["FractalAD", "Padim", "EfficientAd"]
    assert list(results.status) == ["done", "done", "failed"]


def test_what_is_measured(results: pd.DataFrame) -> None:
    done = results[results.status == "done"]
    image = ("image_AUROC", "image_AUPR", "image_F1Max")
    for metric in (*image, "pixel_AUROC", "pixel_AUPR", "pixel_F1Max", "pixel_AUPRO"):
        assert done[metric].between(0, 1).all(), metric
    for runtime in RUNTIMES:
        for figure in ("file_mb", "latency_ms", "latency_90_ms", "images_per_second"):
            assert (done[f"{runtime}/{figure}"] > 0).all(), (runtime, figure)
        assert runtime == "torch" or done[f"{runtime}/image_AUROC"].between(0, 1).all()
    assert (done.fit_seconds > 0).all()
    assert (done.train_images_per_second * done.fit_seconds).round().tolist() == [96, 8]
    assert (done.peak_memory_mb > 100).all()
    assert done.trainable_parameters["Padim"] == 0
    assert 0 < done.trainable_parameters["FractalAD"] < done.total_parameters["FractalAD"]
    assert (done["openvino_fp32/precision"] == "f32").all()
    assert (done["openvino_fp16/file_mb"] < 0.7 * done["openvino_fp32/file_mb"]).all()
    assert (done["image_AUROC/blot"] == done.image_AUROC).all()


def test_openvino_keeps_the_quality(results: pd.DataFrame) -> None:
    done = results[results.status == "done"]
    assert done["openvino_fp32/image_AUROC"].tolist() == pytest.approx(done.image_AUROC.tolist(), abs=0.07)


def test_quality_agrees_with_the_scores(output: Path) -> None:
    (file,) = (file for file in output.glob("jobs/*.json") if "FractalAD on" in file.read_text())
    content = json.loads(file.read_text())
    _, labels, scores = zip(*content["scores"], strict=True)
    assert content["quality"]["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores))


def test_a_failure_is_reported_with_its_reason(results: pd.DataFrame, output: Path) -> None:
    assert "give init_args.imagenet_dir a folder" in results.reason["EfficientAd"]
    assert results.reason["EfficientAd"] in (output / "report.md").read_text()


def test_the_report_tells_all(output: Path) -> None:
    report = (output / "report.md").read_text()
    for heading in (
        "What was run",
        "Quality",
        "Cost",
        "Speed",
        "Image AUROC by type of defect",
        "Jobs that did not end",
    ):
        assert f"# {heading}" in report
    for text in (
        "| FractalAD | epochs: 12, train_batch_size: 2, precision: bf16-mixed |",
        "64 x 64",
        "| Padim | OpenVINO INT8 |",
        "INFERENCE_PRECISION_HINT: f32",
    ):
        assert text in report


@pytest.mark.parametrize("kind", ["latency", "fit_time", "defects", "heat_maps"])
def test_figures_are_drawn(kind: str, output: Path) -> None:
    assert f"({kind}_tiles.png)" in (output / "report.md").read_text()
    pixels = np.asarray(Image.open(output / f"{kind}_tiles.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_a_second_call_does_nothing(output: Path, tile_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times_of_change(output.glob("jobs/*"))
    run(output, [FRACTALAD, PADIM, EFFICIENTAD], tile_root)
    assert before == times_of_change(output.glob("jobs/*"))
    assert "3 jobs, 3 of them" in capsys.readouterr().out


def test_runtimes_are_added_without_training(first: First, results: pd.DataFrame) -> None:
    assert len(first.checkpoints) == 2
    assert first.checkpoints == times_of_change(first.checkpoints)
    before = results.loc[first.results.index, first.results.columns]
    pd.testing.assert_frame_equal(before, first.results, check_dtype=False)
    assert "openvino_fp32/latency_ms" in results.columns.difference(first.results.columns)


def test_trained_models_are_kept_with_their_thresholds(first: First) -> None:
    (file,) = (file for file in first.checkpoints if "FractalAD on" in file.parent.with_suffix(".json").read_text())
    assert FractalAD.load_from_checkpoint(file).post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("normal_test_dir", ["test/good", None])
def test_every_model_has_the_same_images(normal_test_dir: str | None, tile_root: Path, tmp_path: Path) -> None:
    """anomalib divides images at random unless it is told otherwise."""
    data = folder(tile_root)
    data["init_args"] |= {"val_split_mode": "from_test", "normal_test_dir": normal_test_dir}
    jobs = make_jobs([FRACTALAD, PADIM], [data], [0, 1, 2, 3], Settings())  # type: ignore[list-item]
    images: dict[tuple[str, int], list[list[str]]] = {}
    for job in jobs:
        _, datamodule = build(job.spec, tmp_path)
        parts = (datamodule.train_data, datamodule.val_data, datamodule.test_data)
        images[job.model, job.seed] = [sorted(part.samples.image_path) for part in parts]
    divisions = [images["FractalAD", seed] for seed in range(4)]
    assert divisions == [images["Padim", seed] for seed in range(4)]
    assert any(division != divisions[0] for division in divisions)


def test_data_without_masks(tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = folder

    def without_masks(root: Path) -> dict[str, Any]:
        data = plain(root)
        data["init_args"]["mask_dir"] = None
        return data

    monkeypatch.setitem(globals(), "folder", without_masks)
    epoch = {name: FRACTALAD[name] for name in ("class_path", "init_args")} | {"epochs": 1}
    report = run(tmp_path, [epoch], tile_root, repetitions=1, runtimes=["torch"], seeds=[0, 1]).read_text()
    results = pd.read_csv(tmp_path / "results.csv")
    assert (results.status == "done").all()
    assert results.seed.tolist() == [0, 1]
    assert results.image_AUROC.between(0, 1).all()
    assert (results.train_images_per_second * results.fit_seconds).round().tolist() == [8, 8]
    assert (
        "| model | runs | image AUROC | image AP | image F1-max |\n| --- | --- | --- | --- | --- |\n| FractalAD | 2 |"
        in report
    )
    assert "| FractalAD | epochs: 1 |" in report
    assert "pixel AP" not in report
    assert (tmp_path / "heat_maps_tiles.png").exists()


def test_running_out_of_time(tile_root: Path, tmp_path: Path) -> None:
    settings = Settings(image_size=(64, 64), accelerator="cpu")
    (job,) = make_jobs([EFFICIENTAD], [folder(tile_root)], [0], settings)  # type: ignore[list-item]
    record = record_of(job, tmp_path)
    run_in_process(job, record, time_limit=0.01)
    assert record.content["status"] == "timed out"
    assert record.content["reason"] == "ran out of time: 0.01 s were over in the stage 'starting'"
    assert not is_missing(job, record)
    assert is_missing(job, record, retry=True)
    run_in_process(job, record)
    assert record.content["status"] == "failed"
    assert "give init_args.imagenet_dir a folder" in record.content["reason"]


def test_a_training_that_was_interrupted_goes_on(
    first: First, tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C within the third epoch; the second call ends with the weights of the training that nothing stopped."""
    monkeypatch.setattr("anomalib_fractalad.benchmark.runner.POLL_SECONDS", 0.02)
    settings = Settings(image_size=(64, 64), accelerator="cpu", threads=1, runtimes=("torch",), repetitions=3)
    (job,) = make_jobs([FRACTALAD], [folder(tile_root)], [0], settings)  # type: ignore[list-item]
    record = record_of(job, tmp_path)
    shown: list[str] = []

    def interrupt(stage: str) -> None:
        shown.append(stage)
        if "epoch 3 of 12" in stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(job, record, show=interrupt)
    assert record.training_checkpoint.exists()
    assert is_missing(job, record_of(job, tmp_path))
    assert re.search(r"training, epoch 3 of 12, loss [\d.]+, 0:00:\d\d left", shown[-1])
    told: list[str] = []
    run_in_process(job, record, tell=told.append)
    assert record.content["status"] == "done"
    (line,) = told
    assert re.search(r"seed 0: training goes on after epoch [23], 0:00:\d\d of training so far", line)
    assert not record.training_checkpoint.exists()
    cost = record.content["cost"]
    assert cost["train_images_per_second"] * cost["fit_seconds"] == pytest.approx(12 * 8)
    unbroken = record_of(job, first.output)
    assert_same_weights(*map(FractalAD.load_from_checkpoint, (record.checkpoint, unbroken.checkpoint)))
    assert record.content["scores"] == unbroken.content["scores"]


def test_a_crash_within_the_training_of_an_anomalib_model(tile_root: Path, tmp_path: Path) -> None:
    entry = {
        "class_path": "ReverseDistillation",
        "init_args": {"backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"], "pre_trained": False},
        "epochs": 3,
    }
    (job,) = make_jobs([entry], [folder(tile_root)], [0], Settings((64, 64), "cpu", 1))  # type: ignore[list-item]
    checkpoint = tmp_path / "training.ckpt"

    def crash(progress: dict[str, Any]) -> None:
        if progress["epoch"] == 3:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(*build(job.spec, tmp_path), job.spec, tmp_path, checkpoint, FitMeter(crash))
    before = torch.load(checkpoint, weights_only=False)
    assert before["epoch"] == 1
    meter = FitMeter(print)
    cost = fit(*build(job.spec, tmp_path), job.spec, tmp_path, checkpoint, meter)
    assert meter.resumed is not None
    assert meter.resumed["epochs"] == 2
    assert cost["fit_seconds"] > meter.resumed["seconds"] > 0
    assert meter.images == 3 * 8
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CannotResumeError, match=r"cannot go on from .*training.ckpt: .*damaged"):
        fit(*build(job.spec, tmp_path), job.spec, tmp_path, checkpoint, FitMeter(print))


def test_killing_the_command_ends_its_job(tmp_path: Path) -> None:
    script = """if True:
        from pathlib import Path
        from anomalib_fractalad.benchmark.config import Job
        from anomalib_fractalad.benchmark.record import Record
        from anomalib_fractalad.benchmark.runner import run_in_process
        run_in_process(Job("m", "d", 0, {"model": {"init_args": {}}}), Record(Path("record.json")))
    """
    command = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    end = time.monotonic() + 300
    try:
        while not (jobs := psutil.Process(command.pid).children()):
            assert command.poll() is None
            assert time.monotonic() < end, "no job was begun"
            time.sleep(0.1)
    finally:
        command.kill()
    _, alive = psutil.wait_procs(jobs, timeout=60)
    assert not alive


def test_metrics_are_of_raw_maps(first: First, tile_root: Path, tmp_path: Path) -> None:
    """A threshold low in the range, as a good model's may be, makes most of what anomalib reports 1."""
    (file,) = (file for file in first.checkpoints if "Padim on" in file.parent.with_suffix(".json").read_text())
    model = Padim.load_from_checkpoint(file)
    data = Folder(**folder(tile_root)["init_args"])
    post_processor = model.post_processor
    post_processor._pixel_threshold.copy_(post_processor.pixel_min)
    post_processor._image_threshold.copy_(post_processor.image_min)
    collector = ScoreCollector([], tmp_path)
    quality, _, _ = evaluate(model, data, collector, "cpu", tmp_path)
    assert model.post_processor is post_processor

    images = [data.test_data[i] for i in range(len(data.test_data))]
    model.eval()
    with torch.no_grad():
        raw = [model.model(model.pre_processor(image.image.unsqueeze(0))) for image in images]
    maps = torch.cat([found.anomaly_map.squeeze(1) for found in raw])
    masks = torch.stack([image.gt_mask for image in images]).bool()
    labels, scores = [bool(image.gt_label) for image in images], [found.pred_score.item() for found in raw]
    found, _ = (values.flatten().numpy() for values in (maps, masks))
    assert found.max() > 1  # what torchmetrics would take the sigmoid of
    assert quality["pixel_AUPR"] == pytest.approx(average_precision_score(masks.flatten(), found), abs=1e-5)
    assert quality["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.flatten(), found), abs=1e-5)
    assert quality["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores))
    assert [score for *_, score in collector.scores] == pytest.approx(scores, rel=1e-5)
    reported = torch.cat([post_processor(result).anomaly_map for result in raw])
    assert (reported == 1).float().mean() > 0.02

    with nothing_clamped(post_processor, scores):
        exported = torch.cat([post_processor(result).pred_score.flatten() for result in raw])
    assert roc_auc_score(labels, exported) == quality["image_AUROC"]
    assert 0 < exported.min() < exported.max() < 1
    assert (post_processor.image_threshold == post_processor.image_min).all()


def test_metrics_agree_with_scikit_learn(tmp_path: Path) -> None:
    collector = ScoreCollector(["test/a/0.png"], tmp_path)
    labels, masks = torch.tensor([0, 1, 0, 1, 1, 0]).bool(), torch.rand(6, 16, 16) > 0.8
    masks[~labels] = False
    scores, maps = 1000 + 50 * torch.randn(6), 20 * torch.randn(6, 16, 16)
    for part in (slice(0, 4), slice(4, 6)):
        batch = ImageBatch(
            image=torch.rand(6, 3, 16, 16)[part],
            image_path=[f"test/{'ab'[i % 2]}/{i}.png" for i in range(6)][part],
            gt_label=labels[part],
            gt_mask=masks[part],
            pred_score=scores[part],
            anomaly_map=maps[part],
        )
        collector.on_test_batch_end(None, None, None, batch, 0)  # type: ignore[arg-type]
    found = collector.quality()

    def best_f1(truth: torch.Tensor, predictions: torch.Tensor) -> float:
        precision, recall, _ = precision_recall_curve(truth.flatten(), predictions.flatten())
        return float((2 * precision * recall / (precision + recall + 1e-12)).max())

    expected = {
        "image_AUROC": roc_auc_score(labels, scores),
        "image_AUPR": average_precision_score(labels, scores),
        "image_F1Max": best_f1(labels, scores),
        "pixel_AUROC": roc_auc_score(masks.flatten(), maps.flatten()),
        "pixel_AUPR": average_precision_score(masks.flatten(), maps.flatten()),
        "pixel_F1Max": best_f1(masks, maps),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert [score for *_, score in collector.scores] == pytest.approx(scores.tolist())
    batch.anomaly_map[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the prediction of test/a/4.png is not a number"):
        collector.on_test_batch_end(None, None, None, batch, 0)  # type: ignore[arg-type]


def test_auroc_of_each_defect() -> None:
    scores = [
        ("good/0.png", False, 0.1),
        ("good/1.png", False, 0.5),
        ("dent/0.png", True, 0.3),
        ("cut/0.png", True, 0.9),
    ]
    assert defect_auroc(scores) == {"cut": 1.0, "dent": 0.5}
    assert defect_auroc(scores[2:]) == {}
