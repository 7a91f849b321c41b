# SPDX-License-Identifier: Apache-2.0
"""The studies run, and their figures are of what they say; what came of them is in docs/what_was_tried.md."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib.models import AnomalibModule
from bootstrap_by_tile import bootstrap_by_tile
from choose_between_methods import choose_between_methods
from choose_by_synthetic_defects import choose_by_synthetic_defects
from choose_length import choose_length
from choose_stages import choose_stages
from common import figures, make_defects, predict
from conftest import make_tiles, save, small_engine
from int8_on_new_images import int8_on_new_images
from openvino import opset13
from split_by_tile import split_by_tile
from where_defects_lie import where_defects_lie

from anomalib_fractalad import AAND, FractalAD

SIZE = 64


def trained(model: AnomalibModule, root: Path, folder: Path, epochs: int) -> Path:
    engine = small_engine(folder, max_epochs=epochs)
    engine.fit(model, datamodule=make_tiles(root))
    return Path(engine.best_model_path or "")


@pytest.fixture(scope="module")
def aand(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pre_processor = AAND.configure_pre_processor((SIZE, SIZE))
    model = AAND("test_resnet", pre_trained=False, split=(1, 1), pre_processor=pre_processor)
    return trained(model, tile_root, tmp_path_factory.mktemp("aand"), epochs=2)


@pytest.mark.slow
def test_what_is_chosen_for_aand(aand: Path, tile_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tile_root / "train/good"
    by_stages = choose_stages(aand, images, kinds=("bright", "crack"), every=1, first=0, size=SIZE)
    assert len(by_stages) == 2 * (2**3 - 1)
    by_length = choose_length(aand, images, images, epochs=(1,), size=SIZE)
    assert len(by_length[1]) == 4 + 1
    found = choose_between_methods(
        [aand],
        images,
        images,
        kinds=("bright", "crack"),
        mirror=True,
        backbone="test_resnet",
        layers=("layer2", "layer3"),
        pre_trained=False,
        memory=50,
        size=SIZE,
    )
    assert list(found) == ["model", "model, mirrored", "PatchCore", "PatchCore, mirrored"]
    # All stages and published alignment are the model as it was trained.
    torch.testing.assert_close(
        torch.tensor(found["model"]), torch.tensor(by_stages["[4, 8, 16] corners"]), atol=1e-3, rtol=0
    )
    for values in [*by_stages.values(), *by_length.values(), *found.values()]:
        assert values[-1] == pytest.approx(tuple(torch.tensor(values[:-1]).mean(dim=0).tolist()))
    assert "8 normal images; pixel AP, image AUROC of bright, crack; mean" in capsys.readouterr().out


def test_a_model_that_sees_brightness_finds_what_is_bright() -> None:
    normal = torch.rand(4, 3, SIZE, SIZE) / 100 + 0.3
    made = make_defects(normal, ["bright"])
    bright, mean = figures(lambda images: (images[:, :1], images.amax((1, 2, 3))), normal, made)
    assert mean == pytest.approx(bright)
    assert bright[0] > 0.95
    assert bright[1] == 1


def test_where_defects_lie(tile_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = FractalAD("test_resnet", pre_trained=False, distillation=False)
    where_defects_lie(trained(model, tile_root, tmp_path, epochs=1), tile_root)
    printed = capsys.readouterr().out
    assert "blot (4 images): image AUROC mean" in printed
    assert "synthetic: pixel AUROC" in printed


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Tiles of three photographs each, one of them in the test images."""
    for tile in range(10):
        for part, exposure in (("train", 1), ("train", 2), ("test", 3)):
            file = tmp_path / f"magnetic/{part}/good/exp{exposure}_num_{1000 * tile + exposure}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    for kind in ("test/crack", "ground_truth/crack"):
        (tmp_path / "magnetic" / kind).mkdir(parents=True)
        (tmp_path / "magnetic" / kind / "exp1_num_5.png").touch()
    return tmp_path / "magnetic"


def test_no_tile_is_in_training_and_test(photographs: Path, tmp_path: Path) -> None:
    split_by_tile(photographs, tmp_path / "new")
    tiles = {
        part: {int(file.stem.rpartition("_")[2]) // 1000 for file in (tmp_path / f"new/{part}/good").iterdir()}
        for part in ("train", "test")
    }
    assert len(tiles["train"]) == 8
    assert len(tiles["test"]) == 2
    assert not tiles["train"] & tiles["test"]
    assert (tmp_path / "new/ground_truth/crack/exp1_num_5.png").exists()
    with pytest.raises(ValueError, match="name a new folder"):
        split_by_tile(photographs, tmp_path / "new")


def test_the_interval_holds_the_difference(tmp_path: Path) -> None:
    records = []
    for name, noise in (("sure", 0.1), ("unsure", 2.0)):
        scores = [
            (f"test/{label}/exp1_num_{1000 * i}.png", label, label + noise * torch.randn(1).item())
            for i in range(40)
            for label in (False, True)
        ]
        records.append(tmp_path / f"{name}.json")
        records[-1].write_text(
            json.dumps({"scores": [(f"{label}/{Path(n).name}", label, s) for n, label, s in scores]})
        )
    difference, low, high = bootstrap_by_tile((records[0], records[1]), draws=100)
    assert 0 < low < difference < high < 1


def test_int8_on_new_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = opset13.parameter([1, 3, -1, -1], name="input")
    score = opset13.reduce_max(image, [0, 1, 2, 3])
    score.output(0).set_names({"pred_score"})
    openvino.save_model(openvino.Model([score], [image]), tmp_path / "model.xml")
    files: Any = tmp_path / "model.xml", tmp_path / "model.xml"
    int8_on_new_images(*files, "fabric", images=8)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len({line.rpartition(" ")[2] for line in lines}) == 1


def test_predict_gives_raw_maps(aand: Path) -> None:
    model = AAND.load_from_checkpoint(aand).eval()
    maps, scores = predict(model, torch.rand(2, 3, 96, 96))
    assert maps.shape == (2, 1, 96, 96)
    assert scores.shape == (2,)


def test_the_choice_is_compared_with_real_images(
    tile_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "tiles"
    for folder in ("test", "ground_truth"):
        (root / folder).parent.mkdir(exist_ok=True)
        (root / folder).symlink_to(tile_root / folder)
    random = np.random.default_rng(0)
    for index in range(22):
        image = 120 + 40 * np.sin(np.arange(SIZE) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (SIZE, SIZE))
        save(image, root / "train/good" / f"{index:02}.png")
    arguments = "{memory_size: 40, reservoir_size: 400, pre_trained: false}"
    candidate = f"- {{name: memory, size: 64, model: {{class_path: FractalMemory, init_args: {arguments}}}}}"
    (tmp_path / "candidates.yaml").write_text(candidate)
    choose_by_synthetic_defects([root], tmp_path, tmp_path / "candidates.yaml", backbone="test_resnet")
    figures = json.loads((tmp_path / "results.json").read_text())["tiles"]["memory"]
    assert figures["real image AUROC"] > 0.9
    assert 0.5 < figures["synthetic image AUROC"] < 1
    assert figures["synthetic quality"] == pytest.approx(
        (figures["synthetic image AUROC"] + figures["synthetic pixel AP"]) / 2
    )
    assert "tiles memory" in capsys.readouterr().out
