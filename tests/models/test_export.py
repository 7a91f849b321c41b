# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from conftest import FLOAT32, small_engine
from openvino import Core, Model, opset13
from test_all_models import small_model
from torch.fx.graph_module import _loader as generated_code

from anomalib_fractalad.models.components import DistillationModule
from anomalib_fractalad.models.components.export import CONVOLUTIONS, quantize_features, symbolic_shapes
from anomalib_fractalad.plugin import MODELS


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


def test_int8_asks_for_images() -> None:
    with pytest.raises(ValueError, match="give the export a datamodule"):
        DistillationModule._post_training_quantization_ov(Model([], []), None)


def test_int8_asks_for_thresholds() -> None:
    image = opset13.parameter([1, 3, 8, 8], name="image")
    network = Model([opset13.subtract(image, np.float32("nan"))], [image])  # the least score, before a validation
    with pytest.raises(ValueError, match="INT8 needs thresholds, and this model was never validated"):
        quantize_features(network, [])
