# SPDX-License-Identifier: Apache-2.0
"""Another threshold of images for a network that was exported already."""

from pathlib import Path

import numpy as np

from .openvino import mark_as_own


def set_threshold(file: Path, threshold: float) -> None:
    """Change what an exported network compares normalized scores with, in place.

    Args:
        file: An .xml file of OpenVINO's, or an .onnx file.
        threshold: Scores above it are anomalous.
    """
    if file.suffix == ".onnx":
        _in_onnx(file, threshold)
    else:
        _in_openvino(file, threshold)


def _in_openvino(file: Path, threshold: float) -> None:
    import openvino  # noqa: PLC0415

    network = openvino.Core().read_model(file, config={"ENABLE_MMAP": False})
    comparison = network.output("pred_label").node.input_value(0).node
    while comparison.get_type_name() != "Greater":
        comparison = comparison.input_value(0).node
    constant = openvino.opset13.constant(np.float32(threshold))
    comparison.input(1).replace_source_output(constant.output(0))
    openvino.save_model(network, file, compress_to_fp16=False)
    mark_as_own(file)


def _in_onnx(file: Path, threshold: float) -> None:
    import onnx  # noqa: PLC0415

    network = onnx.load(file, load_external_data=False)
    sources = {output: node for node in network.graph.node for output in node.output}
    comparison = sources["pred_label"]
    while comparison.op_type != "Greater":
        comparison = sources[comparison.input[0]]
    constant = onnx.numpy_helper.from_array(np.array(threshold, dtype=np.float32), "image_threshold_of_this_file")
    network.graph.initializer.append(constant)
    comparison.input[1] = constant.name
    onnx.save(network, file)
