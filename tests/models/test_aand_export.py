# SPDX-License-Identifier: Apache-2.0
"""AAND's score is the same in Lightning, TorchInferencer, ONNX Runtime and OpenVINO, with either student."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import make_tiles
from lightning import seed_everything
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import AAND

TOLERANCE = 1e-3
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def trained(backbone: str, root: Path, tile_root: Path) -> Engine:
    seed_everything(0)
    model = AAND(
        backbone=backbone,
        pre_trained=False,
        pre_processor=PreProcessor(Resize((64, 64), antialias=True)),
        visualizer=False,
    )
    engine = Engine(
        accelerator="cpu",
        max_epochs=4,
        check_val_every_n_epoch=4,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    engine.fit(model, datamodule=make_tiles(tile_root))
    return engine


def assert_same(reference: Any, maps: Any, score: Any, label: Any) -> None:
    maps, score, label = (torch.as_tensor(value).detach().squeeze() for value in (maps, score, label))
    torch.testing.assert_close(maps, reference.anomaly_map.squeeze(), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(score, reference.pred_score.squeeze(), atol=TOLERANCE, rtol=0)
    assert label == reference.pred_label.squeeze()


def in_onnx_runtime(file: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"input": images}), strict=True))


@pytest.mark.parametrize(
    ("backbone", "size", "fixed"),
    [
        ("test_resnet", (64, 64), True),
        ("resnet18", (100, 150), False),
    ],
)
def test_one_score_everywhere(
    backbone: str,
    tile_root: Path,
    size: tuple[int, int],
    fixed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    engine = trained(backbone, tmp_path, tile_root)
    image = tmp_path / "image.png"
    save_image(torch.rand(1, 3, *size), image)
    (lightning,) = engine.predict(engine.model, data_path=image)
    arguments = {"export_root": tmp_path, "input_size": size if fixed else None}
    torch_file = engine.export(engine.model, ExportType.TORCH, **arguments)
    onnx_file = engine.export(engine.model, ExportType.ONNX, **arguments)
    openvino_file = engine.export(engine.model, ExportType.OPENVINO, **arguments)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "failed" not in printed.lower()

    from_torch = TorchInferencer(torch_file, device="cpu").predict(image)
    assert_same(lightning, from_torch.anomaly_map, from_torch.pred_score, from_torch.pred_label)
    from_onnx = in_onnx_runtime(onnx_file, read_image(image, as_tensor=True).unsqueeze(0).numpy())
    assert_same(lightning, from_onnx["anomaly_map"], from_onnx["pred_score"], from_onnx["pred_label"])
    from_openvino = OpenVINOInferencer(openvino_file, "CPU", FLOAT32).predict(image)
    assert_same(lightning, from_openvino.anomaly_map, from_openvino.pred_score, from_openvino.pred_label)


def test_an_export_without_a_pre_processor_takes_the_size_it_is_made_for(tmp_path: Path) -> None:
    model = AAND(backbone="test_resnet", pre_trained=False, pre_processor=False, visualizer=False).eval()
    with pytest.raises(ValueError, match="give input_size"):
        model.to_onnx(tmp_path)
    file = model.to_onnx(tmp_path, input_size=(70, 53))
    images = torch.rand(3, 3, 70, 53)
    with torch.no_grad():
        reference = model(images)
    outputs = in_onnx_runtime(file, images.numpy())
    np.testing.assert_allclose(outputs["anomaly_map"], reference.anomaly_map, atol=TOLERANCE)
    np.testing.assert_allclose(outputs["pred_score"], reference.pred_score, atol=TOLERANCE)
