# SPDX-License-Identifier: Apache-2.0
"""Training in several processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine import Engine
from conftest import make_tiles, run_script
from distributed_training import BY_PROGRAM
from test_all_models import small_model
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training.callbacks import warn_of_repetitions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    run_script(Path(__file__).with_name("distributed_training.py"), tile_root, folder)
    return folder


def of_both(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((results / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_processes_come_to_the_same_weights_by_anomalies_of_their_own(results: Path, name: str) -> None:
    one, other = of_both(results, name)
    assert one["weights"] == other["weights"]
    assert len(one["random"]) == 2
    assert not set(one["random"]) & set(other["random"])


@pytest.mark.parametrize("name", MODELS)
def test_metrics_are_those_of_one_process(results: Path, name: str, tile_root: Path, tmp_path: Path) -> None:
    one, other = of_both(results, name)
    assert one["metrics"] == other["metrics"]
    assert metrics_of_one_process(name, results / name, tile_root, tmp_path) == pytest.approx(one["metrics"], abs=1e-5)


def metrics_of_one_process(name: str, folder: Path, data: Path, root: Path, **arguments: Any) -> Any:
    (checkpoint,) = folder.rglob("*.ckpt")
    engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, logger=False)
    (metrics,) = engine.test(small_model(name, **arguments), datamodule=make_tiles(data), ckpt_path=checkpoint)
    return metrics


@pytest.mark.parametrize("name", BY_PROGRAM)
def test_the_program_trains_in_several_processes(results: Path, name: str, tile_root: Path, tmp_path: Path) -> None:
    one, other = of_both(results, f"program_{name}")
    assert one == other
    assert one["processes"] == 2
    program = results / "program" / name  # with the default pre-processor
    default = {"head": False} if name == "FractalMemory" else {}
    metrics = metrics_of_one_process(name, program, tile_root, tmp_path, pre_processor=True, **default)
    assert metrics == pytest.approx(one["metrics"], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_hold_the_random_numbers_of_every_process(results: Path, name: str) -> None:
    (checkpoint,) = (results / name).rglob("*.ckpt")
    one, other = torch.load(checkpoint, weights_only=True)["callbacks"]["ExactResume"]["random_states"]
    assert not torch.equal(one["cpu"], other["cpu"])


@pytest.mark.parametrize(("images", "seen"), [(4, 4), (5, 6)])
def test_images_that_are_validated_more_than_once_are_told(
    images: int,
    seen: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    chosen = torch.rand(images, 1)  # by a sampler of the user's own, out of ten
    loader = DataLoader(TensorDataset(torch.rand(10, 1)), sampler=DistributedSampler(chosen, num_replicas=2, rank=0))
    warn_of_repetitions([loader, [1, 2]])
    expected = [f"Lightning makes {seen} validation images out of {images}"] if seen > images else []
    told = [message.partition(",")[0] for message in caplog.messages if "validation images" in message]
    assert told == expected
