# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import nncf
import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.models import get_model
from anomalib.models.components.base.export_mixin import ExportMixin
from conftest import FLOAT32, small_engine
from openvino import Core, Model, convert_model, opset13
from openvino.frontend.onnx import ConversionExtension
from test_all_models import small_model
from torch.fx.graph_module import _loader as generated_code

from anomalib_fractalad.export.openvino import (
    CONVOLUTIONS,
    decide_constant_choices,
    quantize_features,
    symbolic_shapes,
)
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.registration import MODELS


def test_arguments_of_the_conversion_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received = []
    monkeypatch.setattr(ExportMixin, "to_openvino", lambda *_, ov_kwargs, **__: received.append(ov_kwargs))
    model = small_model("FractalAD")
    model.to_openvino(tmp_path)
    model.to_openvino(tmp_path, ov_kwargs={"share_weights": False})
    theirs = ConversionExtension("Abs", lambda node: opset13.abs(node.get_input(0)).outputs())
    model.to_openvino(tmp_path, ov_kwargs={"extension": theirs})
    model.to_openvino(tmp_path, ov_kwargs={"extension": [theirs, theirs]})
    assert [list(arguments) for arguments in received[:2]] == [["extension"], ["share_weights", "extension"]]
    assert [len(arguments["extension"]) for arguments in received] == [1, 1, 2, 3]
    assert received[2]["extension"][1] is received[3]["extension"][2] is theirs


class Choices(torch.nn.Module):
    """Choices whose condition is true, false, both, or not known; the last one makes a scalar as large as the image."""

    conditions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("conditions", torch.tensor([True, False]))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        yes, no = self.conditions
        return (
            torch.where(yes, image + 1, 2 * image),
            torch.where(no, image + 1, 2 * image),
            torch.where(self.conditions, image + 1, 2 * image),
            torch.where(image > 0, image + 1, 2 * image),
            torch.where(yes, torch.tensor(3.0), image),
        )


def test_choices_come_out_as_they_would(tmp_path: Path) -> None:
    image = torch.tensor([[-1.0, 2.0], [3.0, -4.0]])
    file = tmp_path / "choices.onnx"
    torch.onnx.export(Choices(), (image,), file, opset_version=18, verbose=False)
    network = convert_model(file, extension=[decide_constant_choices()])
    assert sum(operation.get_type_name() == "Select" for operation in network.get_ordered_ops()) == 3
    found = Core().compile_model(network, "CPU", FLOAT32)(image.numpy()).values()
    for ours, expected in zip(found, Choices()(image), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), expected)


@pytest.mark.parametrize("name", MODELS)
def test_int8_is_for_convolutions_between_features(name: str, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    small_engine(tmp_path).validate(model, datamodule=tiles)  # for the thresholds
    known_shapes, known_code = symbolic_shapes(), set(generated_code.eval_cache)
    file = model.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=tiles)
    assert set(generated_code.eval_cache) == known_code
    new = [shapes for shapes in symbolic_shapes() if shapes not in known_shapes]
    assert all(shapes.tracked_fakes is None for shapes in new)  # the cycle of references is cut

    operations = Core().read_model(file).get_ordered_ops()
    assert "Select" not in {operation.get_type_name() for operation in operations}  # all choices were known beforehand
    quantised = {}
    for operation in operations:
        if operation.get_type_name() in CONVOLUTIONS:
            values, weights = (operation.input_value(i).get_node() for i in (0, 1))
            channels = operation.get_input_partial_shape(0)[1].get_length()
            eight_bits = values.get_type_name() == "FakeQuantize"
            assert eight_bits == (weights.get_type_name() != "Constant")
            quantised.setdefault(eight_bits, []).append(channels)
    assert max(quantised[False]) == 3
    assert min(quantised[True]) > 3
    for operation in operations:
        if operation.get_type_name() == "FakeQuantize":
            assert {use.get_node().get_type_name() for use in operation.output(0).get_target_inputs()} <= CONVOLUTIONS

    images = next(iter(tiles.test_dataloader())).image
    predict = Core().compile_model(file, "CPU", FLOAT32)
    (output,) = (output for output in predict.outputs if "anomaly_map" in output.names)
    with torch.no_grad():
        expected = model.eval()(images).anomaly_map
    found = torch.from_numpy(predict(images.numpy())[output])
    assert not torch.allclose(found, expected, atol=1e-6)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("name", ["FractalAD", "AAND"])
def test_nncf_can_quantise_everything(name: str, tmp_path: Path) -> None:
    """As anomalib's INT8_ACQ does; OpenVINO has to take what comes of it."""
    settings = {"post_processor": False, "pre_processor": False, "visualizer": False, "evaluator": False}
    model = get_model(name, backbone="test_resnet", pre_trained=False, **settings)
    file = model.to_openvino(tmp_path, input_size=(64, 96))
    images = [np.random.default_rng(0).random((1, 3, 64, 96), dtype=np.float32)] * 2
    network = nncf.quantize(Core().read_model(file), nncf.Dataset(images))
    anomaly_map = Core().compile_model(network, "CPU", FLOAT32)(images[0])["anomaly_map"]
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images[0])).anomaly_map
    assert torch.corrcoef(torch.stack([torch.from_numpy(anomaly_map).flatten(), expected.flatten()]))[0, 1] > 0.9


def test_int8_asks_for_images() -> None:
    with pytest.raises(ValueError, match="give the export a datamodule"):
        OneClassModule._post_training_quantization_ov(Model([], []), None)


def test_int8_asks_for_thresholds() -> None:
    image = opset13.parameter([1, 3, 8, 8], name="image")
    network = Model([opset13.subtract(image, np.float32("nan"))], [image])  # the least score, before a validation
    with pytest.raises(ValueError, match="INT8 needs thresholds, and this model was never validated"):
        quantize_features(network, [])
