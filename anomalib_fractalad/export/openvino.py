# SPDX-License-Identifier: Apache-2.0
"""What conversion to OpenVINO needs beyond anomalib's."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_fractalad import __version__

if TYPE_CHECKING:
    from openvino import Model
    from openvino.frontend.onnx import ConversionExtension


def decide_constant_choices() -> "ConversionExtension":
    """Have OpenVINO keep one branch of each choice whose condition is known, as it does not by itself.

    anomalib's post-processing chooses, for the whole map, whether there are thresholds and a range to normalize by.

    Returns:
        An extension for :func:`openvino.convert_model`.
    """
    from openvino import opset13  # noqa: PLC0415
    from openvino.frontend.onnx import ConversionExtension  # noqa: PLC0415

    def where(node: Any) -> list[Any]:
        condition, *branches = (node.get_input(i) for i in range(3))
        choice = opset13.select(condition, *branches)
        if condition.get_node().get_type_name() == "Constant":
            known = condition.get_node().data
            if known.all() or not known.any():
                branch = branches[0] if known.all() else branches[1]
                if branch.get_partial_shape() == choice.output(0).get_partial_shape():
                    return [branch]
        return list(choice.outputs())

    return ConversionExtension("Where", where)


def halve_weights(model: "Model") -> "Model":
    """Store weights in 16 bits, as OpenVINO does by itself, but for those that take little room and lose most by it.

    These are vectors, as are the squares of a memory's items, and kernels of depthwise convolutions.

    Args:
        model: An exported network, which is changed.

    Returns:
        The same.
    """
    from openvino import Type, opset13  # noqa: PLC0415

    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.f32:
            continue
        weights, readers = node.data, node.output(0).get_target_inputs()
        if sum(side > 1 for side in weights.shape) < 2 or _are_depthwise(readers):
            continue
        with np.errstate(over="ignore"):
            half = weights.astype(np.float16)
        if np.isfinite(half).all():
            restored = opset13.convert(opset13.constant(half), "f32")
            for reader in readers:
                reader.replace_source_output(restored.output(0))
    return model


def _are_depthwise(readers: Iterable[Any]) -> bool:
    """Whether weights go to a convolution by groups, reshaped or not."""
    nodes = [reader.get_node() for reader in readers]
    return any(
        node.get_type_name() == "GroupConvolution"
        or (node.get_type_name() == "Reshape" and _are_depthwise(node.output(0).get_target_inputs()))
        for node in nodes
    )


def mark_as_own(file: Path) -> Path:
    """Note in an OpenVINO file that this package wrote it, for the repair of what reads images for it.

    Args:
        file: The .xml file.

    Returns:
        The same.
    """
    text = file.read_text()
    head, section, tail = text.rpartition("<rt_info>")
    if section:
        file.write_text(f'{head}{section}\n\t\t<anomalib_fractalad value="{__version__}" />{tail}')
    return file
