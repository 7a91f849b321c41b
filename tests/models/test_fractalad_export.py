# SPDX-License-Identifier: Apache-2.0
"""One score everywhere: Lightning, TorchInferencer, ONNX Runtime and OpenVINO."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import FLOAT32, assert_same_prediction, export_everywhere, in_onnx_runtime, make_tiles
from lightning import seed_everything
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import FractalAD

FIXED_SIZE = (100, 150)
SIZES = [(64, 64), FIXED_SIZE, (41, 33)]


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


@pytest.fixture(scope="module", params=["dynamic", "fixed"])
def exported(
    request: pytest.FixtureRequest,
    engine: Engine,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """The three exported files and the image sizes that they take."""
    fixed = request.param == "fixed"
    root = tmp_path_factory.mktemp(request.param)
    files = export_everywhere(engine, root, FIXED_SIZE if fixed else None)
    return dict(zip(("torch", "onnx", "openvino"), files, strict=True), sizes=[FIXED_SIZE] if fixed else SIZES)


def test_one_score_everywhere(
    engine: Engine,
    exported: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer makes a cache in the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    from_torch = TorchInferencer(exported["torch"], device="cpu")
    from_openvino = OpenVINOInferencer(exported["openvino"], "CPU", FLOAT32)
    for size in exported["sizes"]:
        image = tmp_path / f"{size}.png"
        save_image(torch.rand(3, *size), image)
        # The trainer's own loop, which resizes outside the exported model.
        (lightning,) = engine.predict(engine.model, data_path=image)
        for inferencer in (from_torch, from_openvino):
            assert_same_prediction(inferencer.predict(image), lightning)
        outputs = in_onnx_runtime(exported["onnx"], read_image(image, as_tensor=True).unsqueeze(0))
        assert_same_prediction(outputs, lightning)


def test_exporting_prints_no_failure(engine: Engine, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = engine.export(engine.model, ExportType.ONNX, export_root=tmp_path, onnx_kwargs={"opset_version": 19})
    printed = "".join(capfd.readouterr()).lower()
    assert "traceback" not in printed
    assert "failed" not in printed
    assert "[torch.onnx]" not in printed  # its progress
    assert [entry.version for entry in onnx.load(file).opset_import if not entry.domain] == [19]


def test_without_a_pre_processor_the_network_takes_any_size_and_batch(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FractalAD(backbone="test_resnet", pre_trained=False, score="top", pre_processor=False, visualizer=False)
    file = model.eval().to_onnx(tmp_path)
    assert "FractalAD was never validated, so it has no thresholds: exported, it compares raw scores" in caplog.text
    for shape in ((1, 3, 64, 96), (3, 3, 70, 53)):
        images = torch.rand(shape)
        assert_same_prediction(in_onnx_runtime(file, images), model(images))


def test_a_model_without_distillation_is_exported_for_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = FractalAD(backbone="test_resnet", pre_trained=False, distillation=False, visualizer=False)
    file = model.eval().to_openvino(tmp_path, input_size=FIXED_SIZE)
    images = torch.rand(1, 3, *FIXED_SIZE)
    assert_same_prediction(OpenVINOInferencer(file, "CPU", FLOAT32).predict(images), model(images))
