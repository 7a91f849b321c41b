# SPDX-License-Identifier: Apache-2.0
"""One score everywhere: Lightning, TorchInferencer, ONNX Runtime and OpenVINO."""

from pathlib import Path

import pytest
import torch
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import assert_one_score_everywhere, assert_same_prediction, in_onnx_runtime, make_tiles
from lightning import seed_everything
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import ADPS


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tile_root: Path) -> Engine:
    seed_everything(0)
    model = ADPS(
        backbone="test_resnet",
        pre_trained=False,
        patches=2,
        split_layers=[4],
        smoothing=2.0,
        learning_rate=1e-3,
        pre_processor=PreProcessor(Resize((64, 128), antialias=True)),
        visualizer=False,
    )
    engine = Engine(
        accelerator="cpu",
        max_epochs=10,
        check_val_every_n_epoch=10,
        enable_progress_bar=False,
        default_root_dir=tmp_path_factory.mktemp("export"),
    )
    engine.fit(model, datamodule=make_tiles(tile_root))
    return engine


@pytest.mark.parametrize(("size", "fixed"), [((100, 150), True), ((41, 33), False)])
def test_one_score_everywhere(
    engine: Engine,
    size: tuple[int, int],
    fixed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    image = tmp_path / "image.png"
    save_image(torch.rand(1, 3, *size), image)
    lightning, onnx_file = assert_one_score_everywhere(engine, image, tmp_path, capfd, size if fixed else None)
    assert lightning.anomaly_map.std() > 1e-3
    if not fixed:
        images = torch.rand(3, 3, 50, 70)
        with torch.no_grad():
            batch = engine.model.eval()(images)
        assert_same_prediction(in_onnx_runtime(onnx_file, images), batch)


def test_a_size_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    model = ADPS(backbone="test_resnet", pre_trained=False, patches=4, pre_processor=False, visualizer=False)
    with pytest.raises(ValueError, match=r"64x96 .*cannot be divided into 4 x 4 patches"):
        model.to_onnx(tmp_path, input_size=(64, 96))


def test_a_checkpoint_is_exported(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    image = torch.rand(3, 50, 70)
    with torch.no_grad():
        reference = engine.model.eval()(image.unsqueeze(0))
    other = ADPS(backbone="test_resnet", pre_trained=False, visualizer=False)
    file = engine.export(other, ExportType.TORCH, export_root=tmp_path, ckpt_path=checkpoint)
    assert_same_prediction(TorchInferencer(file, device="cpu").predict(image), reference)
