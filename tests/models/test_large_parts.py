# SPDX-License-Identifier: Apache-2.0
"""Images far larger than 256x256: anomalib's tiler, its tiled ensemble, and a larger image_size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.data.utils.tiler import Tiler
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from anomalib.pipelines.tiled_ensemble.components.utils import helper_functions
from conftest import FLOAT32, assert_same_prediction, in_onnx_runtime, make_tiles, small_engine, tile_arguments
from jsonargparse import Namespace
from torchvision.utils import save_image

import anomalib_fractalad
from anomalib_fractalad.models.components import TileByTile
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.registration import MODELS

TILE = 32


def small_model(name: str, **arguments: Any) -> Any:
    extra = {"ADPS": {"patches": 2}, "FractalMemory": {"head": True}}.get(name, {})
    kind = getattr(anomalib_fractalad, name)
    return kind(**{"backbone": "test_resnet", "pre_trained": False, "visualizer": False, **extra, **arguments})


def test_tiles_are_predicted_one_at_a_time_and_joined() -> None:
    sizes = []

    def predict(tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(tiles.shape)
        return tiles.mean(dim=1, keepdim=True)

    images = torch.rand(2, 3, 40, 70)
    tiler = Tiler(TILE, stride=16)
    maps = TileByTile()(predict, images, tiler)
    torch.testing.assert_close(maps, images.mean(dim=1, keepdim=True))
    assert sizes == [(2, 3, TILE, TILE)] * 8
    assert not hasattr(tiler, "batch_size")  # it is as it was


@pytest.mark.parametrize("name", MODELS)
def test_a_tiled_map_is_that_of_the_tiles(name: str) -> None:
    model = small_model(name).model.eval()
    images = torch.rand(2, 3, 2 * TILE, TILE)
    with torch.no_grad():
        whole = model(images)
        tiles = [model.predict_map(images[:, :, row : row + TILE]) for row in (0, TILE)]
        model.tiler = Tiler(TILE, TILE)
        tiled = model(images)
    expected = torch.cat(tiles, dim=2)
    if name == "AAND":
        expected = model.smooth(expected)
    scored = model.smooth(expected) if name == "ADPS" else expected
    to_score: Callable[[torch.Tensor], torch.Tensor] = torch.nn.Identity()
    if name == "FractalMemory":  # the score is the distance's, the map is of the levels that saturate
        scored, agreement = (model.smooth(channel) for channel in torch.split(expected, 1, dim=1))
        expected, to_score = model.saturation.excess(agreement), torch.log1p
    torch.testing.assert_close(tiled.anomaly_map, expected)
    assert not torch.allclose(tiled.anomaly_map, whole.anomaly_map, atol=1e-4)
    torch.testing.assert_close(tiled.pred_score, to_score(model.score(scored)))


@pytest.mark.parametrize("name", MODELS)
def test_training_on_tiles_and_one_score_everywhere(
    name: str, tiles: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    pre_processor = OneClassModule.configure_pre_processor((64, 64))
    model = small_model(name, pre_processor=pre_processor)
    seen = []
    model.model.teacher.register_forward_pre_hook(lambda _module, images: seen.append(images[0].shape))
    callback = TilerConfigurationCallback(enable=True, tile_size=TILE, stride=TILE)
    engine = small_engine(tmp_path, max_epochs=2, callbacks=[callback])
    engine.fit(model, datamodule=tiles)
    assert {shape[-2:] for shape in seen} == {(TILE, TILE)}
    assert max(shape[0] for shape in seen) == 4 * tiles.train_batch_size

    loaded = type(model).load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    image = tmp_path / "image.png"
    save_image(torch.rand(3, 100, 90), image)
    (lightning,) = small_engine(tmp_path).predict(loaded, data_path=image)
    file = engine.export(loaded, ExportType.TORCH, export_root=tmp_path)
    assert_same_prediction(TorchInferencer(file, device="cpu").predict(image), lightning)
    if name != "FractalAD":  # the same code, and slow
        return
    file = engine.export(loaded, ExportType.ONNX, export_root=tmp_path)
    assert_same_prediction(in_onnx_runtime(file, read_image(image, as_tensor=True).unsqueeze(0)), lightning)
    assert_same_prediction(OpenVINOInferencer(file, "CPU", FLOAT32).predict(image), lightning)


def test_a_checkpoint_brings_its_tiler_and_takes_it_away() -> None:
    tiled, plain = {}, {}
    model = small_model("FractalAD")
    model.on_save_checkpoint(plain)
    model.model.tiler = Tiler(TILE, stride=16)
    model.on_save_checkpoint(tiled)
    model = small_model("FractalAD")
    model.on_load_checkpoint(tiled)
    assert model.model.tiler.tile_size_h == TILE
    model.on_load_checkpoint(plain)
    assert model.model.tiler is None
    model.on_load_checkpoint(tiled)
    assert model.model.tiler.tile_size_h == TILE
    model.model.tiler = given = Tiler(2 * TILE, TILE)
    model.on_load_checkpoint(tiled)
    assert model.model.tiler is given


def test_an_image_smaller_than_a_tile_is_refused() -> None:
    model = small_model("FractalAD").model.eval()
    model.tiler = Tiler(64, 64)
    with pytest.raises(ValueError, match=r"Tile size \(64, 64\) exceeds image size \(32, 64\)"):
        model(torch.rand(1, 3, 32, 64))


@pytest.mark.parametrize("name", MODELS)
def test_a_larger_image_size(name: str, tiles: Folder, tmp_path: Path) -> None:
    kind = getattr(anomalib_fractalad, name)
    model = small_model(name, pre_processor=kind.configure_pre_processor((96, 160)))
    engine = small_engine(tmp_path, max_steps=1)
    engine.fit(model, datamodule=tiles)
    predictions = engine.predict(model, datamodule=tiles)
    assert predictions[0].anomaly_map.shape[-2:] == (96, 160)


@pytest.mark.parametrize("name", MODELS)
def test_tiled_ensemble(
    name: str,
    tile_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiles = make_tiles(tile_root)
    arguments = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(tmp_path),
        "tiling": {"image_size": [64, 32], "tile_size": [32, 32], "stride": 32},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {
            "class_path": "anomalib.data.Folder",
            "init_args": {
                **tile_arguments(tile_root),
                "train_batch_size": tiles.train_batch_size,
                "eval_batch_size": tiles.eval_batch_size,
                "test_split_mode": "from_dir",
            },
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
        "TrainModels": {"model": {"class_path": name}, "trainer": {"max_epochs": 1}},
    }
    # Class path alone: anomalib 2.7.0 fails on arguments of any model here.
    monkeypatch.setattr(helper_functions, "get_model", lambda model, **parts: small_model(model["class_path"], **parts))
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "ensemble.yaml"
    config.write_text(yaml.safe_dump(arguments))
    train = TrainTiledEnsemble()
    train.run(Namespace(config=config))
    EvalTiledEnsemble(train.root_dir).run(Namespace(config=config))
    assert "errors" not in capsys.readouterr().out
    assert len(list(train.root_dir.rglob("model*.ckpt"))) == 2
    assert list(train.root_dir.rglob("*.csv"))
