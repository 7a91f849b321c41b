# SPDX-License-Identifier: Apache-2.0
"""Files of fewer bits, of any anomalib model, in each of anomalib's kinds."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from torchmetrics import Metric

from .int8 import calibration_images, check_validation, quantize, quantize_weights, quantize_within_drop

if TYPE_CHECKING:
    from openvino import Model


def compress(
    model: "Model",
    compression_type: CompressionType,
    datamodule: AnomalibDataModule | None = None,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> "Model":
    """Compress an exported network.

    Args:
        model: The network.
        compression_type: ``FP16``, ``INT8`` (weights alone), ``INT8_PTQ`` or ``INT8_ACQ``.
        datamodule: Images for ``INT8_PTQ`` and ``INT8_ACQ``.
        metric: For ``INT8_ACQ``; left out, F1 of images.
        max_drop: For ``INT8_ACQ``: how much the metric may lose.

    Returns:
        The compressed network.
    """
    if compression_type == CompressionType.FP16:
        return halve_weights(model)
    if compression_type == CompressionType.INT8:
        return quantize_weights(model)
    if compression_type == CompressionType.INT8_PTQ:
        return quantize(model, calibration_images(datamodule))
    return quantize_within_drop(model, datamodule, metric, max_drop)  # type: ignore[arg-type]


def compress_file(file: Path, target: Path, *arguments: Any) -> None:
    """Compress an exported network's .xml file to another, whose folder is made; see :func:`compress`."""
    import openvino  # noqa: PLC0415

    network = openvino.Core().read_model(file, config={"ENABLE_MMAP": False})  # or Windows keeps the file
    network = compress(network, *arguments)
    target.parent.mkdir(parents=True, exist_ok=True)
    openvino.save_model(network, target, compress_to_fp16=False)


def check_compression(
    compression_type: CompressionType | None,
    datamodule: AnomalibDataModule | None,
    max_drop: float,
) -> None:
    """Refuse, before a model is exported, what :func:`compress` would refuse afterwards.

    Args:
        compression_type: What to compress to.
        datamodule: Its images.
        max_drop: How much the metric may lose by ``INT8_ACQ``.

    Raises:
        ValueError: If there are no images, or ``max_drop`` is out of range.
        ModuleNotFoundError: If NNCF is not installed.
    """
    if compression_type == CompressionType.FP16:
        return
    if find_spec("nncf") is None:
        msg = "compression to INT8 needs NNCF: install anomalib-fractalad[openvino]"
        raise ModuleNotFoundError(msg)
    if compression_type == CompressionType.INT8:
        return
    if compression_type == CompressionType.INT8_ACQ:
        check_validation(datamodule, max_drop)
    else:
        calibration_images(datamodule)


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
