# SPDX-License-Identifier: Apache-2.0
"""The report, from records written by hand."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from anomalib_fractalad.benchmark.config import Job
from anomalib_fractalad.benchmark.plots import plot_defects, plot_fit_time, plot_latency
from anomalib_fractalad.benchmark.record import Record, conditions, is_missing, record_of, state_of
from anomalib_fractalad.benchmark.report import write_report
from anomalib_fractalad.benchmark.runner import describe_stage, run_in_process

SPEC: dict[str, Any] = {
    "model": {"class_path": "anomalib.models.Draem", "init_args": {"dtd_dir": None, "enable_sspcab": True}},
    "epochs": None,
    "steps": 30,
    "train_batch_size": None,
    "precision": "16-mixed",
    "image_size": None,
    "threads": 2,
    "versions": {"anomalib": "2.7.0"},
    "code": "0123abcd",
}
MEASURING: dict[str, Any] = {"runtimes": ["torch", "openvino_int8"], "repetitions": 50, "sheet_images": 6}
ENVIRONMENT = {"platform": "Linux", "cpu": "a CPU", "cores": 2, "cuda": None}


def make_job(model: str, seed: int) -> Job:
    spec = {**SPEC, "seed": seed, "name": model}
    return Job(model, "part", seed, spec, MEASURING, {"enable_sspcab": True}, ("no texture images",))


def write(output: Path, job: Job, auroc: float, **values: Any) -> Record:
    record = record_of(job, output)
    content = {
        "status": "done",
        "environment": ENVIRONMENT,
        "quality": {"image_AUROC": auroc, "image_AUPR": 0.5},
        "defects": {"dent": auroc, "cut": 1.0},
        "cost": {"fit_seconds": 10.0 + job.seed, "total_parameters": 1234567},
        "runtimes": {
            "torch": {"latency_ms": 60.0, "device": "cpu"},
            "openvino_fp32": {"latency_ms": 18.0, "precision": "f32", "image_AUROC": auroc},
            "openvino_int8": {"reason": "RuntimeError: no|way"},
        },
    }
    record.save(**{**content, **values})
    return record


@pytest.fixture
def report(tmp_path: Path) -> str:
    jobs = [make_job(model, seed) for model in ("one", "two", "lost") for seed in (0, 1)]
    for job, auroc in zip(jobs[:3], (0.8, 0.9, 0.7), strict=True):
        write(tmp_path, job, auroc)
    for job in jobs[3:]:
        record_of(job, tmp_path).save(status="timed out", reason="ran out of time")
    return write_report(jobs, tmp_path).read_text()


def test_tables_hold_mean_and_spread(report: str) -> None:
    assert "| model | runs | image AUROC | image AP |\n" in report
    assert "| one | 2 | 0.850 ± 0.071 | 0.500 ± 0.000 |\n" in report
    assert "| two | 1 | 0.700 | 0.500 |\n" in report
    assert "| lost | 0 | - | - |\n" in report
    assert "| model | runs | dent | cut |\n" in report
    assert "| one | 2 | 10.5 ± 0.7 | 1,234,567 ± 0 |\n" in report
    assert "| one | torch | - | 60.0 ± 0.0 | - | - | - | cpu |  |\n" in report
    assert "| one | OpenVINO FP32 | - | 18.0 ± 0.0 | - | - | 0.850 ± 0.071 | f32 |  |\n" in report
    assert r"| one | OpenVINO INT8 | - | - | - | - | - | - | RuntimeError: no\|way |" in report
    assert "pixel" not in report


def test_what_was_run(report: str) -> None:
    assert "| one | steps: 30, precision: 16-mixed | enable_sspcab: true | no texture images |\n" in report
    assert "Seeds: 0, 1; image size: each model's own; CPU threads: 2; versions: anomalib 2.7.0; code of" in report
    assert "code of anomalib-fractalad: 0123abcd.\n" in report
    assert "Machine: a CPU, 2 cores, Linux." in report


def test_jobs_without_a_result_have_their_reason(report: str, tmp_path: Path) -> None:
    assert "| lost | part | 0 | timed out | ran out of time |\n" in report
    results = pd.read_csv(tmp_path / "results.csv")
    assert list(results.status) == ["done"] * 3 + ["timed out"] * 3
    assert list(results["image_AUROC/dent"][:3]) == [0.8, 0.9, 0.7]


def test_the_sheet_shows_every_model_on_the_same_images(tmp_path: Path) -> None:
    jobs = [make_job("red", 0), make_job("blue", 0)]
    for job, color in zip(jobs, ("red", "blue"), strict=True):
        record = write(tmp_path, job, 0.5, sheet=[{"image_path": "test/dent/0.png", "score": 0.25}])
        record.folder.mkdir()
        for kind, fill in (("image", "lime"), ("mask", "white"), ("map", color)):
            Image.new("RGB", (32, 32), fill).save(record.folder / f"{kind}_0.png")
    assert "(heat_maps_part.png)" in write_report(jobs, tmp_path).read_text()
    pixels = np.asarray(Image.open(tmp_path / "heat_maps_part.png").convert("RGB")).reshape(-1, 3)
    areas = [(pixels == color).all(axis=1).sum() for color in ((0, 255, 0), (255, 0, 0), (0, 0, 255))]
    assert min(areas) > 1000
    assert max(areas) < 1.1 * min(areas)


def test_no_figure_of_nothing(tmp_path: Path) -> None:
    job = make_job("lost", 0)
    record_of(job, tmp_path).save(status="failed", reason="why not")
    assert "![" not in write_report([job], tmp_path).read_text()
    assert not list(tmp_path.glob("*.png"))


def test_a_process_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = tmp_path / "killer.py"
    killer.write_text("import os; print('so long', flush=True); os.kill(os.getpid(), 9)")
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec python3 {killer}\n")
    (tmp_path / "python").chmod(0o755)
    job = make_job("dying", 0)
    record = record_of(job, tmp_path)
    run_in_process(job, record)
    assert record.content["status"] == "failed"
    assert record.content["reason"] == (
        "the process was ended by SIGKILL (out of memory?) in the stage 'starting'; it said last: so long"
    )


@pytest.fixture
def done(tmp_path: Path) -> Record:
    """All that was to be measured, but for a failure; the trained model was kept."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").write_bytes(b"0")
    figures = {"latency_ms": 60.0, **conditions("torch", MEASURING)}
    failure = {"reason": "no way", **conditions("openvino_int8", MEASURING)}
    record = write(
        tmp_path,
        make_job("one", 0),
        0.5,
        runtimes={"torch": figures, "openvino_int8": failure},
        sheet_images=6,
        inputs=state_of([images]),
    )
    record.folder.mkdir()
    record.checkpoint.touch()
    return record


def measuring(**changes: Any) -> Job:
    return dataclasses.replace(make_job("one", 0), measuring={**MEASURING, **changes})


def test_what_is_missing(done: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_missing(measuring(), done)
    assert not is_missing(measuring(runtimes=["torch"]), done, retry=True)
    assert is_missing(measuring(), done, retry=True)
    assert is_missing(measuring(runtimes=["torch", "openvino_fp32"]), done)
    assert is_missing(measuring(repetitions=9), done)
    assert is_missing(measuring(sheet_images=3), done)
    done.checkpoint.unlink()
    assert not is_missing(measuring(sheet_images=3), done)  # a sheet is not worth a training
    monkeypatch.setattr("anomalib_fractalad.benchmark.provenance.version", lambda _: "another")
    assert is_missing(measuring(), done)


@pytest.mark.parametrize(
    ("stopped", "goes_on"),
    [({"status": "failed"}, False), ({"status": "failed", "killed": True}, True), ({"status": "timed out"}, True)],
)
def test_what_was_stopped_goes_on_from_what_it_kept(stopped: dict[str, Any], goes_on: bool, done: Record) -> None:
    done.save(**stopped)
    assert is_missing(measuring(runtimes=["openvino_fp32"]), done) == goes_on
    assert not is_missing(measuring(), done)  # all is measured, or failed by itself
    assert is_missing(measuring(), done, retry=True)
    done.checkpoint.unlink()
    assert not is_missing(measuring(), done)
    done.training_checkpoint.touch()
    assert is_missing(measuring(), done) == goes_on
    done.clear()
    assert list(done.content) == ["inputs"]
    assert done.training_checkpoint.exists()


def test_a_runtime_that_takes_all_the_time_is_not_tried_again(done: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = done.file.parent / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(sleeper))
    monkeypatch.setattr(Record, "read", lambda self: self.content.update(stage="openvino_int8"))
    job = measuring()
    run_in_process(job, done, time_limit=0.2)
    assert done.content["status"] == "timed out"
    assert done.content["runtimes"]["openvino_int8"]["reason"].startswith("ran out of time: 0.2 s were over in the")
    assert not is_missing(job, done)
    assert is_missing(measuring(runtimes=["torch", "openvino_fp16"]), done)


def test_progress_in_words() -> None:
    progress = {"epoch": 3, "epochs": None, "step": 40, "steps": 2000, "loss": 0.01234567, "seconds_left": 3725.2}
    words = "training, epoch 3, step 40 of 2000, loss 0.01235, 1:02:05 left"
    assert describe_stage({"stage": "training", "progress": progress}) == words
    nothing = dict.fromkeys(progress)
    assert describe_stage({"stage": "training", "progress": {**nothing, "epoch": 1, "epochs": 1}}) == (
        "training, epoch 1 of 1"
    )
    assert describe_stage({"stage": "testing"}) == "testing"


def test_changed_images_are_noticed(done: Record, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "1.png").write_bytes(b"1")
    assert is_missing(measuring(), done)
    assert not done.is_trained
    (images / "1.png").unlink()
    assert not is_missing(measuring(), done)
    (images / "0.png").write_bytes(b"another")
    assert is_missing(measuring(), done)
    shutil.rmtree(images)
    assert not is_missing(measuring(), done)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_kept_for_another_run(kept: bool, done: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kept:
        done.checkpoint.unlink()
    monkeypatch.setattr("sys.executable", "true")
    run_in_process(measuring(), done)
    assert done.content["status"] == "failed"  # since nothing ran
    assert ("quality" in done.content) == kept
    assert list(done.content.get("runtimes", {})) == (["torch"] if kept else [])


def test_a_torn_record_counts_as_missing(tmp_path: Path) -> None:
    record = record_of(make_job("torn", 0), tmp_path)
    record.save(status="done")
    record.file.write_text(record.file.read_text()[:9])
    assert record_of(make_job("torn", 0), tmp_path).content == {}


RESULTS = pd.DataFrame(
    {
        "model": ["one", "one", "two", "three"],
        "seed": [0, 1, 0, 0],
        "image_AUROC": [0.96, 0.98, 0.965, 0.7],
        "fit_seconds": [10.0, 30.0, 100.0, 400.0],
        "torch/latency_ms": [50.0, 50.0, 20.0, 300.0],
        "openvino_int8/latency_ms": [10.0, 10.0, None, None],
        "openvino_int8/image_AUROC": [0.9, 0.9, None, None],
        "image_AUROC/dent": [0.9, 1.0, 0.8, 0.6],
        "image_AUROC/cut": [0.7, 0.7, 0.75, 0.5],
    },
)


def drawn(axes: Any) -> dict[str, list[float]]:
    return {points.get_label(): points.get_offsets().data.tolist()[0] for points in axes.collections}


def test_the_plot_of_latency_says_who_is_best_and_who_is_fastest() -> None:
    figure = plot_latency(RESULTS)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "two has the best image AUROC, 0.965\none answers fastest, in 10 ms"
    expected = {"one, OpenVINO INT8": [10, 0.9], "two, torch": [20, 0.965], "three, torch": [300, 0.7]}
    assert drawn(axes) == {label: pytest.approx(point) for label, point in expected.items()}


def test_the_plot_of_fit_time_shows_means_and_the_range_over_seeds() -> None:
    figure = plot_fit_time(RESULTS)
    assert figure is not None
    (axes,) = figure.axes
    title = "one and two are level in image AUROC, 0.965 to 0.970\none is fastest to train, in 20 s"
    assert axes.get_title(loc="left") == title
    assert drawn(axes)["one"] == pytest.approx([20, 0.97])
    assert axes.lines[0].get_ydata() == pytest.approx([0.96, 0.98])


def test_the_plot_of_defects_names_the_hardest() -> None:
    figure = plot_defects(RESULTS)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Hardest to find: cut, with an image AUROC of 0.75 at best"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cut", "dent"]
    assert axes.collections[0].get_offsets().data.tolist() == [pytest.approx([0.7, 0]), pytest.approx([0.95, 1])]


@pytest.mark.parametrize(("auroc", "lowest"), [(0.995, 0.48), (0.4, 0)])
def test_axes_of_plots_span_from_chance_to_one(auroc: float, lowest: float) -> None:
    results = RESULTS.assign(image_AUROC=[1.0, 1.0, 1.0, auroc], **{"image_AUROC/dent": auroc, "image_AUROC/cut": 1.0})
    fit_time, defects = plot_fit_time(results), plot_defects(results)
    assert fit_time is not None
    assert defects is not None
    assert fit_time.axes[0].get_ylim() == pytest.approx((lowest, 1.02))
    assert defects.axes[0].get_xlim() == pytest.approx((lowest, 1.02))


def test_models_are_told_apart_in_gray() -> None:
    figure = plot_fit_time(pd.DataFrame({"model": list("abcdef"), "image_AUROC": 0.9, "fit_seconds": range(1, 7)}))
    assert figure is not None
    points = figure.axes[0].collections
    grays = sorted(np.dot(model.get_facecolor()[0][:3], [0.299, 0.587, 0.114]) for model in points)
    assert np.diff(grays).min() > 0.08
    assert len({model.get_paths()[0].vertices.tobytes() for model in points}) == 6
    assert figure.axes[0].get_title(loc="left").startswith("6 of 6 models are level in image AUROC, 0.900 to 0.900")
