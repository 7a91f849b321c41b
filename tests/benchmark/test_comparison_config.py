# SPDX-License-Identifier: Apache-2.0
"""A comparison is checked before it runs."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

from anomalib_fractalad.benchmark.__main__ import benchmark, main
from anomalib_fractalad.benchmark.config import Job, Settings, make_jobs
from anomalib_fractalad.benchmark.fit import build
from anomalib_fractalad.benchmark.provenance import PACKAGE, package_digest
from anomalib_fractalad.benchmark.surroundings import cpu_threads, quiet, trusted_files, working_directory

CONFIGS = Path(__file__).parents[2] / "configs"
DATA: dict[str, Any] = {"class_path": "SurfaceDefects"}
PADIM: dict[str, Any] = {"class_path": "Padim"}


def jobs(*models: Any, data: Any = (DATA,), seeds: Any = (0,), **settings: Any) -> list[Job]:
    return make_jobs(models, data, seeds, Settings(**settings))


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "models is empty; give at least one"),
        ([{}], r"models\[0\] has no class_path; give"),
        ([PADIM, {"class_path": "Patchcor"}], r"models\[1\]: anomalib.models has no 'Patchcor'; it has .*Patchcore"),
        ([{**PADIM, "init_args": {"bone": 1}}], r"(?s)models\[0\].*'bone' is not accepted"),
        (
            [{"class_path": "FractalMemory", "init_args": {"head": True}}],
            r"models\[0\] \(FractalMemory\) has no training budget; give epochs or steps",
        ),
        (
            [{"class_path": "FractalMemory", "epochs": 2}],
            r"models\[0\] \(FractalMemory\) has epochs 2, but sets its training length itself",
        ),
        ([{"class_path": "Stfpm"}], r"models\[0\] \(Stfpm\) has no training budget; give epochs or steps"),
        ([{"class_path": "Stfpm", "epochs": 0}], r"\(Stfpm\): epochs is 0; it must be above 0"),
        ([{"class_path": "Stfpm", "epochs": 2, "steps": 3}], "has epochs 2 and steps 3; give one of them"),
        ([{**PADIM, "epochs": 2}], r"\(Padim\) has epochs 2, but sets its training length itself; leave epochs out"),
        (
            [{"class_path": "FractalAD", "init_args": {"epochs": 2}, "steps": 3}],
            "steps 3, but sets its",
        ),
        ([{**PADIM, "precision": "half"}], r"\(Padim\): precision is 'half'; Lightning has .*bf16-mixed"),
        ([PADIM, PADIM], "models has Padim 2 times; give each a name of its own"),
        (
            [{"class_path": "Draem", "epochs": 1, "init_args": {"dtd_dir": "nowhere"}}],
            r"models\[0\] \(Draem\): dtd_dir is 'nowhere', which is no folder; give a folder of images, or",
        ),
    ],
)
def test_mistakes_in_models(models: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(*models)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "seeds is empty; give at least one"),
        ({"seeds": (1, 1)}, "seeds has 1 2 times; leave one out"),
        ({"data": ()}, "data is empty; give at least one"),
        ({"data": ({"class_path": "Tiles"},)}, r"data\[0\]: anomalib.data has no 'Tiles'; it has .*SurfaceDefects"),
        ({"runtimes": ("onnx",)}, "runtimes has 'onnx'; known are torch, openvino_fp32"),
        ({"repetitions": 0}, "repetitions is 0; it must be above 0"),
    ],
)
def test_mistakes_elsewhere(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(PADIM, **arguments)


def test_no_time_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time_limit is 0; it must be above 0 seconds"):
        benchmark([PADIM], [DATA], output=tmp_path, time_limit=0)  # type: ignore[list-item]


def test_a_job_for_each_model_data_and_seed() -> None:
    other = {**PADIM, "name": "other", "init_args": {"n_features": 10}}
    metal = {**DATA, "init_args": {"category": "metal_plate"}}
    found = jobs(PADIM, other, data=(DATA, metal), seeds=(3, 4))
    assert len({job.key for job in found}) == len(found) == 8
    assert str(found[0]) == "Padim on SurfaceDefects fabric, seed 3"
    assert str(found[-1]) == "other on SurfaceDefects metal_plate, seed 4"


def test_lists_and_classes_among_the_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program reads from a file comes out of a job's description as it went in."""
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [64, 64]}}
    arguments = {"name": "tiles", "normal_dir": "good", "abnormal_dir": ["a", "b"], "augmentations": resize}
    config = {"models": [PADIM], "data": [{"class_path": "Folder", "init_args": arguments}], "output": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    specs = []
    monkeypatch.setattr("anomalib_fractalad.benchmark.__main__.run_in_process", lambda job, *_: specs.append(job.spec))
    monkeypatch.setattr("sys.argv", ["benchmark", "--config", str(tmp_path / "config.yaml")])
    with pytest.raises(KeyError, match="status"):  # of a job that has not run
        main()
    (spec,) = specs
    assert spec["data"]["init_args"]["abnormal_dir"] == ["a", "b"]
    assert spec["data"]["init_args"]["augmentations"]["init_args"]["size"] == [64, 64]
    data = _build_data(spec["data"])
    assert data.abnormal_dir == ["a", "b"]
    assert data.train_augmentations.size == [64, 64]


def _build_data(spec: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    return parser.instantiate_classes(parser.parse_object({"data": spec})).data


def test_the_key_depends_on_what_is_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    (key,) = (job.key for job in jobs(PADIM))
    for same in (jobs({**PADIM, "name": "other"}), jobs(PADIM, repetitions=3, sheet_images=1, runtimes=["torch"])):
        assert same[0].key == key
    for changed in (jobs({**PADIM, "precision": "bf16-mixed"}), jobs(PADIM, seeds=[1]), jobs(PADIM, threads=3)):
        assert changed[0].key != key
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    assert jobs(PADIM)[0].key != key
    assert jobs(PADIM, accelerator="cpu")[0].spec["device"] is None


def test_the_key_depends_on_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = jobs(PADIM)[0].key
    with monkeypatch.context() as patch:
        patch.setattr("anomalib_fractalad.benchmark.provenance.version", lambda _: "another")
        assert jobs(PADIM)[0].key != key
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    digest = package_digest()
    assert package_digest(package) == digest == jobs(PADIM)[0].spec["code"]
    file = package / "transforms/fractal.py"
    text = file.read_text()
    for same in (f"{text}\n# a comment\n", text.replace("Fractal anomaly generation", "More words")):
        assert same != text
        file.write_text(same)
        assert package_digest(package) == digest
    (package / "benchmark/report.py").write_text("pass")
    assert package_digest(package) == digest
    file.write_text(f"{text}\nprint()\n")
    changed = package_digest(package)
    assert changed != digest
    monkeypatch.setattr("anomalib_fractalad.benchmark.config.package_digest", lambda: changed)
    assert jobs(PADIM)[0].key != key


def test_the_key_depends_on_the_code_of_a_model_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "users_model.py"
    file.write_text("from anomalib.models import Padim\n\nclass Mine(Padim):\n    pass\n")
    entry = {"class_path": "users_model.Mine"}
    key = jobs(entry)[0].key
    assert jobs(entry)[0].key == key
    file.write_text(f"{file.read_text()}\nthing = 1\n")
    assert jobs(entry)[0].key != key


def test_textures_are_never_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (without,) = jobs({"class_path": "Draem", "epochs": 1})
    assert without.spec["model"]["init_args"]["dtd_dir"] is None
    assert without.notes == ("no texture images (dtd_dir not given): anomalies come from noise",)
    (given,) = jobs({"class_path": "Draem", "epochs": 1, "init_args": {"dtd_dir": str(tmp_path)}})
    assert given.notes == (f"texture images of dtd_dir: {tmp_path}",)


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("benchmark.yaml", 24),
        ("benchmark_mobilenet.yaml", 72),
        ("benchmark_magnetic_tile.yaml", 15),
        ("benchmark_lite0.yaml", 112),
    ],
)
def test_the_config_files_are_valid(file: str, count: int) -> None:
    config = yaml.safe_load((CONFIGS / file).read_text())
    found = make_jobs(config["models"], config["data"], config["seeds"], Settings())
    assert len(found) == count


def test_the_help_tells_what_to_give(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "Models to compare, each with class_path" in printed
    assert "--time_limit" in printed
    assert "usage: python -m anomalib_fractalad.benchmark " in printed


def test_a_missing_package_is_told_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "anomalib_fractalad.benchmark.__main__.find_spec", lambda name: None if name == "tqdm" else found(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"needs tqdm: pip install 'anomalib-fractalad\[benchmark\]'"):
        benchmark([PADIM], [DATA], output=tmp_path)  # type: ignore[list-item]


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0"):
        monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
        if value is not None:
            monkeypatch.setenv("TRUST_REMOTE_CODE", value)
        before = list(warnings.filters), logging.getLogger("anomalib").level, torch.get_num_threads(), Path.cwd()
        with trusted_files(), quiet("anomalib"), cpu_threads(2), working_directory(Path("/")):
            assert os.environ["TRUST_REMOTE_CODE"] == "1"
            assert torch.get_num_threads() == 2
        assert os.environ.get("TRUST_REMOTE_CODE") == value
        assert before == (warnings.filters, logging.getLogger("anomalib").level, torch.get_num_threads(), Path.cwd())
    before_help = list(warnings.filters)
    monkeypatch.setattr("sys.argv", ["benchmark", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert warnings.filters == before_help


def test_a_mistake_is_told_in_one_line() -> None:
    arguments = ["--models", '[{"class_path": "Stfpm"}]', "--data", '[{"class_path": "SurfaceDefects"}]']
    command = [sys.executable, "-m", "anomalib_fractalad.benchmark", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr == "error: models[0] (Stfpm) has no training budget; give epochs or steps\n"
    assert not done.stdout


def test_objects_within_arguments_stay_plain_data(tmp_path: Path) -> None:
    resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [32, 32]}}
    compose = {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [resize]}}
    pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": compose}}
    arguments = {"backbone": "resnet18", "pre_trained": False, "pre_processor": pre_processor}
    (job,) = jobs({**PADIM, "init_args": arguments})
    before = json.dumps(job.spec)
    model, _ = build(job.spec, tmp_path)
    assert model.pre_processor.transform.transforms[0].size == [32, 32]
    assert json.dumps(job.spec) == before
    assert arguments["pre_processor"]["init_args"]["transform"]["init_args"]["transforms"] == [resize]
