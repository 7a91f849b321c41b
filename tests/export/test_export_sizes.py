# SPDX-License-Identifier: Apache-2.0
"""Exports for one size of image, and for any; what needs no training is exported as it is."""

import logging
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.data.transforms import SquarePad
from anomalib.deploy import OpenVINOInferencer
from anomalib.pre_processing import PreProcessor
from conftest import FLOAT32, assert_same_prediction, in_onnx_runtime, small_model
from openvino import Core, convert_model
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

import anomalib_fractalad
from anomalib_fractalad.export.memory import CHATTY
from anomalib_fractalad.export.networks import MatrixUpsample
from anomalib_fractalad.models.components import AlignedUpsample, Upsample
from anomalib_fractalad.post_processing import OrderPreservingPostProcessor
from anomalib_fractalad.registration import MODELS

FIXED = {
    "FractalAD": {"backbone": "test_resnet", "distillation": False},
    "ADPS": {"backbone": "test_resnet", "patches": 2, "split_layers": [4]},
    "AAND": {"backbone": "test_resnet"},
    "FractalMemory": {"backbone": "test_resnet"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_export_for_one_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pre-processor that keeps proportions, and for one size of image only."""
    monkeypatch.chdir(tmp_path)
    transform = Compose([SquarePad(), Resize(64, antialias=False), CenterCrop((64, 64))])
    model = getattr(anomalib_fractalad, name)(
        pre_trained=False, visualizer=False, pre_processor=PreProcessor(transform), **FIXED[name]
    ).eval()
    before = str(model)
    file = model.to_openvino(tmp_path, input_size=(100, 150))
    assert str(model) == before
    images = torch.rand(1, 3, 100, 150)
    with torch.no_grad():
        expected = model(images)
    assert_same_prediction(OpenVINOInferencer(file, "CPU", FLOAT32).predict(images), expected)


class Average(torch.nn.Module):
    """A network of one operation: sizes that follow from the image's cost a large one a minute and a half."""

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        maps = torch.nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 3, stride=1, padding=1)
        return InferenceBatch(pred_score=maps.amax(dim=(1, 2, 3)), anomaly_map=maps)


@pytest.mark.slow
def test_a_shorter_side_is_exported_for_any_size(tmp_path: Path) -> None:
    transform = Resize(64, max_size=90)
    off = OrderPreservingPostProcessor(enable_normalization=False, enable_thresholding=False)
    settings = {"pre_processor": PreProcessor(transform), "post_processor": off, "distillation": False}
    model = small_model("FractalAD", **settings).eval()
    model.model = Average()
    file = model.to_onnx(tmp_path)
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    in_openvino = Core().compile_model(convert_model(file), "CPU", FLOAT32)
    for size in [(96, 144), (144, 96), (100, 100), (40, 30), (512, 97)]:
        images = torch.rand(1, 3, *size)
        with torch.no_grad():
            expected = model.model(transform(images)).anomaly_map
        in_runtime = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))["anomaly_map"]
        torch.testing.assert_close(torch.from_numpy(in_runtime), expected, atol=1e-3, rtol=0)
        found = in_openvino(images.numpy())["anomaly_map"]
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_without_a_pre_processor_fractalad_takes_any_size_and_batch(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = anomalib_fractalad.FractalAD(
        backbone="test_resnet", pre_trained=False, score="top", pre_processor=False, visualizer=False
    )
    chatty = {name: logging.getLogger(name).level for name in CHATTY}
    caplog.set_level(logging.INFO)  # as in anomalib's program
    file = model.eval().to_onnx(tmp_path, opset_version=19)
    printed = "".join(capfd.readouterr()).lower()
    assert "traceback" not in printed
    assert "failed" not in printed
    assert "[torch.onnx]" not in printed  # its progress
    assert [entry.version for entry in onnx.load(file).opset_import if not entry.domain] == [19]
    assert "FractalAD was never validated, so it has no thresholds: exported, it compares raw scores" in caplog.text
    assert sum(record.levelno < logging.WARNING for record in caplog.records) < 10
    assert {name: logging.getLogger(name).level for name in CHATTY} == chatty
    for shape in ((1, 3, 64, 96), (3, 3, 70, 53)):
        images = torch.rand(shape)
        with torch.no_grad():
            assert_same_prediction(in_onnx_runtime(file, images), model(images))


def test_sizes_that_cannot_be_exported_are_refused(tmp_path: Path) -> None:
    settings = {"backbone": "test_resnet", "pre_trained": False, "pre_processor": False, "visualizer": False}
    with pytest.raises(ValueError, match=r"64x96 .*cannot be divided into 4 x 4 patches"):
        anomalib_fractalad.ADPS(patches=4, **settings).to_onnx(tmp_path, input_size=(64, 96))
    for name in ("ADPS", "AAND"):
        with pytest.raises(ValueError, match=f"{name} without a pre-processor .* give input_size"):
            getattr(anomalib_fractalad, name)(**settings).to_onnx(tmp_path)
    padded = {**settings, "backbone": "tf_efficientnet_lite0", "distillation": False}
    with pytest.raises(ValueError, match=r"FractalAD without a pre-processor .* give input_size"):
        anomalib_fractalad.FractalAD(**padded).to_onnx(tmp_path)
    with pytest.raises(ValueError, match=r"FractalMemory without a pre-processor .* give input_size"):
        small_model("FractalMemory", backbone="dm_nfnet_f0", memory_size=5, pre_processor=False).to_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("small", "size"), [((16, 24), (64, 96)), ((5, 1), (18, 3)), ((7, 9), (7, 9))])
def test_upsampling_by_matrices_is_the_same(small: tuple[int, int], size: tuple[int, int]) -> None:
    maps = torch.randn(2, 1, *small, dtype=torch.float64)
    for upsample in (Upsample(), AlignedUpsample(), AlignedUpsample(1)):
        torch.testing.assert_close(MatrixUpsample(upsample)(maps, size), upsample(maps, size))


@pytest.mark.slow
def test_a_head_that_is_exported_for_one_image_searches_by_rows_and_columns(tmp_path: Path) -> None:
    model = small_model("FractalMemory", memory_size=300, post_processor=False).eval()
    memory = model.model.memory
    memory.items.copy_(0.5 * torch.randn(memory.items.shape))
    image = torch.rand(1, 3, 96, 80)
    file = model.to_openvino(tmp_path, input_size=(96, 80), onnx_kwargs={"dynamic_shapes": None})
    network = Core().read_model(file)
    choices = [node for node in network.get_ordered_ops() if node.get_type_name() == "Select"]
    assert [choice.get_output_partial_shape(0)[1].get_length() for choice in choices] == [20, 15] * 3
    found = Core().compile_model(network, "CPU", FLOAT32)(image.numpy())
    with torch.no_grad():
        expected = model(image)
    for name in ("pred_score", "anomaly_map"):
        torch.testing.assert_close(torch.from_numpy(found[name]), getattr(expected, name), atol=1e-3, rtol=0)
