# SPDX-License-Identifier: Apache-2.0
"""One score everywhere: Lightning, TorchInferencer, ONNX Runtime and OpenVINO."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import make_tiles
from lightning import seed_everything
from torchvision.io import read_image
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import ADPS

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


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


def assert_same(prediction: Any, reference: Any) -> None:
    for name in ("anomaly_map", "pred_score"):
        ours, theirs = (to_numpy(getattr(result, name)).squeeze() for result in (prediction, reference))
        np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert bool(prediction.pred_label) == bool(reference.pred_label)


def to_numpy(values: Any) -> np.ndarray:
    return values.detach().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def run_onnx(file: Path, images: np.ndarray) -> Any:
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input": images}), strict=True))
    return type("Prediction", (), outputs)


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
    (lightning,) = engine.predict(engine.model, data_path=image)
    assert lightning.anomaly_map.std() > 1e-3
    capfd.readouterr()
    arguments = {"export_root": tmp_path, "input_size": size if fixed else None}
    torch_file, onnx_file, openvino_file = (
        engine.export(engine.model, kind, **arguments)
        for kind in (ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO)
    )
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "failed" not in printed.lower()
    assert_same(TorchInferencer(torch_file, device="cpu").predict(image), lightning)
    assert_same(run_onnx(onnx_file, (read_image(image) / 255).unsqueeze(0).numpy()), lightning)
    assert_same(OpenVINOInferencer(openvino_file, "CPU", FLOAT32).predict(image), lightning)
    if not fixed:
        images = torch.rand(3, 3, 50, 70)
        with torch.no_grad():
            batch = engine.model.eval()(images)
        outputs = run_onnx(onnx_file, images.numpy())
        np.testing.assert_allclose(outputs.anomaly_map, batch.anomaly_map, atol=1e-3)
        np.testing.assert_allclose(outputs.pred_score, batch.pred_score, atol=1e-3)


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
    assert_same(TorchInferencer(file, device="cpu").predict(image), reference)
