# SPDX-License-Identifier: Apache-2.0
"""One score everywhere: Lightning, TorchInferencer, ONNX Runtime and OpenVINO."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import make_tiles
from lightning import seed_everything
from torchvision.transforms.v2 import Resize

from anomalib_fractalad import FractalAD

TOLERANCE = 1e-3
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
SIZES = [(64, 64), (100, 150), (41, 33)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tile_root: Path) -> Engine:
    seed_everything(0)
    model = FractalAD(
        backbone="test_resnet",
        pre_trained=False,
        score="top",
        pre_processor=PreProcessor(Resize((64, 64), antialias=True)),
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


def images(size: tuple[int, int]) -> torch.Tensor:
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same(reference: object, maps: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(maps).squeeze(), reference.anomaly_map.squeeze(), atol=TOLERANCE)
    np.testing.assert_allclose(np.asarray(scores).squeeze(), reference.pred_score.squeeze(), atol=TOLERANCE)
    assert bool(np.asarray(labels).squeeze()) == bool(reference.pred_label)


def in_lightning(engine: Engine, image: torch.Tensor, folder: Path) -> object:
    """The prediction of the trainer's own loop, which resizes outside the model."""
    from torchvision.utils import save_image

    save_image(image, folder / "image.png")
    (batch,) = engine.predict(engine.model, data_path=folder / "image.png")
    return batch


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fixed", [False, True])
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
    lightning = in_lightning(engine, images(size), tmp_path)
    pixels = lightning.image if size == (64, 64) else None
    arguments = {"export_root": tmp_path, "input_size": size if fixed else None}
    torch_file = engine.export(engine.model, ExportType.TORCH, **arguments)
    onnx_file = engine.export(engine.model, ExportType.ONNX, **arguments)
    openvino_file = engine.export(engine.model, ExportType.OPENVINO, **arguments)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "failed" not in printed.lower()

    from_torch = TorchInferencer(torch_file, device="cpu").predict(tmp_path / "image.png")
    assert_same(lightning, from_torch.anomaly_map, from_torch.pred_score, from_torch.pred_label)

    from anomalib.data.utils import read_image

    array = read_image(tmp_path / "image.png", as_tensor=True).unsqueeze(0).numpy()
    session = onnxruntime.InferenceSession(onnx_file)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input": array}), strict=True))
    assert_same(lightning, outputs["anomaly_map"], outputs["pred_score"], outputs["pred_label"])

    from_openvino = OpenVINOInferencer(openvino_file, "CPU", FLOAT32).predict(tmp_path / "image.png")
    assert_same(lightning, from_openvino.anomaly_map, from_openvino.pred_score, from_openvino.pred_label)
    assert pixels is None or pixels.shape[-2:] == size


def test_a_dynamic_export_takes_batches(engine: Engine, tmp_path: Path) -> None:
    file = engine.export(engine.model, ExportType.ONNX, export_root=tmp_path)
    batch = torch.rand(3, 3, 50, 70)
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"input": batch.numpy()}), strict=True))
    with torch.no_grad():
        reference = engine.model.eval()(batch)
    np.testing.assert_allclose(outputs["anomaly_map"], reference.anomaly_map, atol=TOLERANCE)
    np.testing.assert_allclose(outputs["pred_score"], reference.pred_score, atol=TOLERANCE)


def test_an_opset_can_be_asked_for(engine: Engine, tmp_path: Path) -> None:
    import onnx

    file = engine.model.to_onnx(tmp_path, input_size=(64, 64), opset_version=19)
    assert [entry.version for entry in onnx.load(file).opset_import if not entry.domain] == [19]


@pytest.mark.parametrize("score", ["mean", "max", "top"])
def test_every_score_without_a_pre_processor(score: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FractalAD(backbone="test_resnet", pre_trained=False, score=score, pre_processor=False, visualizer=False)
    file = model.eval().to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(file)
    for size in ((64, 96), (70, 53)):
        image = images(size)
        with torch.no_grad():
            reference = model(image)
        outputs = dict(
            zip([o.name for o in session.get_outputs()], session.run(None, {"input": image.numpy()}), strict=True)
        )
        np.testing.assert_allclose(outputs["anomaly_map"], reference.anomaly_map, atol=1e-4)
        np.testing.assert_allclose(outputs["pred_score"], reference.pred_score, atol=1e-4)
