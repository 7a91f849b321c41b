# SPDX-License-Identifier: Apache-2.0
"""What exports to ONNX and OpenVINO need beyond anomalib's."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader as generated_code

if TYPE_CHECKING:
    from openvino import Model
    from openvino.frontend.onnx import ConversionExtension

CONVOLUTIONS = {"Convolution", "GroupConvolution"}
IMAGE_CHANNELS = 3


@contextmanager
def leave_nothing_behind() -> Iterator[None]:
    """Have torch forget an export when it is over.

    It would keep what it knows of the symbolic shapes, by caches of functions and in a cycle of references that the
    garbage collector cannot see, and the text of the code that it generated: about 5 MB an export.
    """
    known_shapes, known_code = symbolic_shapes(), set(generated_code.eval_cache)
    try:
        yield
    finally:
        for shapes in symbolic_shapes():
            if shapes not in known_shapes:
                shapes.tracked_fakes = None
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for name in set(generated_code.eval_cache) - known_code:
            del generated_code.eval_cache[name]


def symbolic_shapes() -> list[ShapeEnv]:
    """All that torch knows of symbolic shapes at present."""
    return [thing for thing in gc.get_objects() if type(thing) is ShapeEnv]


def decide_constant_choices() -> "ConversionExtension":
    """Have OpenVINO keep one branch of each choice whose condition is known, as it does not by itself.

    anomalib's post-processing chooses, for the whole map, whether there are thresholds and a range to normalise by.

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


def quantize_features(model: "Model", images: Any) -> "Model":
    """Quantise the convolutions between features to INT8, by NNCF's post-training quantisation.

    Convolutions of images and of anomaly maps, with at most three channels, and what is no convolution stay in floating
    point, which costs next to no time: faint defects are steps of one or two grey levels, and 256 levels over the range
    of all images swallow them.

    Args:
        model: An exported network.
        images: Batches with an ``image`` (B, 3, H, W), values in [0, 1], to calibrate with.

    Returns:
        The quantised network.

    Raises:
        ValueError: If values of the network are NaN, as are thresholds before a validation: OpenVINO could not load it.
    """
    import nncf  # noqa: PLC0415

    operations = model.get_ordered_ops()
    constants = [operation.data for operation in operations if operation.get_type_name() == "Constant"]
    if any(np.isnan(value).any() for value in constants if value.dtype.kind == "f"):
        msg = "INT8 needs thresholds, and this model was never validated (or its weights are NaN): run engine.validate"
        raise ValueError(msg)
    types = {operation.get_type_name() for operation in operations}
    ignored = nncf.IgnoredScope(
        types=sorted(types - CONVOLUTIONS - {"Constant", "Parameter", "Result"}),
        names=[
            operation.get_friendly_name()
            for operation in operations
            if operation.get_type_name() in CONVOLUTIONS
            and operation.get_input_partial_shape(0)[1].get_length() <= IMAGE_CHANNELS
        ],
        validate=False,
    )
    dataset = nncf.Dataset(images, lambda batch: np.asarray(batch["image"]))
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.WARNING)  # it lists what is ignored
    try:
        return nncf.quantize(model, dataset, ignored_scope=ignored, fast_bias_correction=False)
    finally:
        logger.setLevel(level)
