# SPDX-License-Identifier: Apache-2.0
"""Transforms of a pre-processor, so that an exported model computes what training did."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from anomalib.data.transforms import SquarePad
from torch import Tensor
from torchvision.transforms.v2 import CenterCrop, Compose, Identity, InterpolationMode, Pad, Resize, Transform

from .resize import AntialiasedResize, ExportCenterCrop, ExportSquarePad, FixedResize, is_antialiased

Size = tuple[int, int]
PROBES: tuple[Size, Size] = ((331, 487), (512, 260))  # one wide, one high
TOLERANCE = 1e-3
SIZED = (Resize, CenterCrop, SquarePad)  # they do nothing to images that have their size
EXPORTED_BY_TORCH = {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, InterpolationMode.NEAREST}


def network_size(transform: Transform | None, input_size: Size | None = None) -> Size | None:
    """Height and width of the images that the network sees.

    Args:
        transform: The pre-processor's transform.
        input_size: Height and width of images, if they all have the same.

    Returns:
        Height and width, or ``None`` where they follow from the image's.
    """
    if transform is None:
        return input_size
    sizes = {_size(transform, probe) for probe in ([input_size] if input_size else PROBES)}
    return sizes.pop() if len(sizes) == 1 else None


def exportable_transform(transform: Transform | None, input_size: Size | None = None) -> Transform | None:
    """Write a transform so that ONNX Runtime and OpenVINO compute what it does in torch.

    Args:
        transform: A transform, or several in a ``Compose``.
        input_size: Height and width of the images; left out, images are of any size.

    Returns:
        The transform to export.

    Raises:
        ValueError: If the transform is random, or cannot be exported for images of any size.
    """
    if transform is None:
        return None
    steps, size = [], input_size
    with torch.random.fork_rng(devices=[]):
        for step in steps_of(transform):
            _refuse_random(step)
    for step in steps_of(transform):
        resized = network_size(step, size)
        if size is None or resized != size or not isinstance(step, SIZED):  # or it leaves images as they are
            steps.append(_exportable_step(step, size))
        size = resized
    exportable = Compose(steps or [Identity()])
    for probe in [input_size] if input_size else PROBES:
        image = _random_image(probe)
        expected, found = transform(image), exportable(image)
        if expected.shape != found.shape or not torch.allclose(expected, found, atol=TOLERANCE):
            msg = f"the pre-processor's {transform} cannot be exported: it would do something else to images of {probe}"
            raise ValueError(msg)
    return exportable


def resizes(transform: Transform | None) -> bool:
    """Whether images of any size come to a size that does not grow with theirs.

    Args:
        transform: A transform, or several in a ``Compose``.
    """
    return transform is not None and any(isinstance(step, Resize) for step in steps_of(transform))


def is_frozen(file: Path) -> bool:
    """Whether torch has made an ONNX file for one size or proportion, which it does where it cannot decide otherwise.

    Args:
        file: An ONNX file.
    """
    import onnx  # noqa: PLC0415

    (image,) = onnx.load(file, load_external_data=False).graph.input
    height, width = (side.dim_param for side in image.type.tensor_type.shape.dim[2:])
    return not height or not width or height == width


def steps_of(transform: Transform) -> Iterator[Transform]:
    """The single transforms of a transform, in their order.

    Args:
        transform: A transform, or several in a ``Compose``.
    """
    if isinstance(transform, Compose):
        for step in transform.transforms:
            yield from steps_of(step)
    else:
        yield transform


def _exportable_step(step: Transform, size: Size | None) -> Transform:
    if isinstance(step, Resize):
        if is_antialiased(step) or size is None:
            return _exportable_resize(step)
        return FixedResize(step, size)
    if size is None:
        if isinstance(step, SquarePad):
            return ExportSquarePad()
        if hasattr(step, "size") and type(step).__name__.endswith("CenterCrop"):
            return ExportCenterCrop(tuple(step.size))
        if not isinstance(step, Pad) and any(_size(step, probe) != probe for probe in PROBES):
            raise ValueError(_any_size_message(step))
    return copy.deepcopy(step)


def _exportable_resize(step: Resize) -> Transform:
    size = None if step.size is None else tuple(step.size)
    if is_antialiased(step):
        cubic = InterpolationMode(step.interpolation) is InterpolationMode.BICUBIC
        return AntialiasedResize(size, step.max_size, cubic)
    if size is not None and len(size) == 2 and InterpolationMode(step.interpolation) in EXPORTED_BY_TORCH:
        return copy.deepcopy(step)
    raise ValueError(_any_size_message(step))


def _any_size_message(step: Transform) -> str:
    return (
        f"the pre-processor's {step} cannot be exported for images of any size: give input_size, the height and width "
        "of the images that the exported model will see"
    )


def _refuse_random(step: Transform) -> None:
    image = _random_image(PROBES[0])
    first = step(image)
    if type(step).__name__.startswith("Random") or any(not torch.equal(step(image), first) for _ in range(3)):
        msg = (
            f"the pre-processor's {step} is random: an exported model cannot give the score of training. Put it into "
            "the data module's train_augmentations"
        )
        raise ValueError(msg)


def _random_image(size: Size) -> Tensor:
    # In float32, torch's own resizing is 1e-4 off where it enlarges much.
    return torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _size(transform: Transform, size: Size) -> Size:
    height, width = transform(torch.zeros(1, 3, *size)).shape[-2:]
    return height, width
