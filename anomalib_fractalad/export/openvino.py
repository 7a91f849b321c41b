# SPDX-License-Identifier: Apache-2.0
"""What conversion to OpenVINO needs beyond anomalib's."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib_fractalad import __version__

if TYPE_CHECKING:
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
