# SPDX-License-Identifier: Apache-2.0
"""INT8: the recipe, and the images that it is calibrated with; for any anomalib model."""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.metrics import F1Score
from torch import Tensor
from torchmetrics import Metric
from torchvision.transforms.v2.functional import InterpolationMode, resize

from anomalib_fractalad.training.random_state import seeded
from anomalib_fractalad.transforms import FractalAnomalyGenerator

from .memory import quiet

if TYPE_CHECKING:
    from openvino import Model

CONVOLUTIONS = {"Convolution", "GroupConvolution"}
IMAGE_CHANNELS = 3
_ANY_SIZE = 256, 256  # to tell the layers' sizes of a network for images of any size

Array = np.ndarray[Any, np.dtype[np.float32]]

logger = logging.getLogger(__name__)


class CalibrationImages(Sequence[Array]):
    """Normal training images, each beside a copy with a fractal anomaly, read when they are asked for.

    Normal images alone leave no room for the values that anomalies give: all scores come out alike. Which images are
    taken, and their anomalies, depend on the seed alone.

    Args:
        dataset: The training images.
        count: Number of images, anomalous ones included; fewer where there are not half as many normal ones.
        seed: Seed of the choice and of the anomalies.
    """

    def __init__(self, dataset: Any, count: int, seed: int) -> None:
        self.dataset = plain(dataset)
        self.seed = seed
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        self.chosen: list[int] = order[: -(-count // 2)].tolist()
        self.total = min(count, 2 * len(self.chosen))
        self.generator = FractalAnomalyGenerator()

    def __len__(self) -> int:
        """Number of images."""
        return self.total

    def __getitem__(self, index: Any) -> Any:
        """Read an image, (1, 3, H, W), values in [0, 1]; odd ones have an anomaly."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        image = self.dataset[self.chosen[position // 2]].image
        if position % 2:
            with seeded(self.seed + position):
                image, _ = self.generator(image)
        return image.unsqueeze(0).numpy()


def calibration_images(datamodule: AnomalibDataModule | None, count: int = 300, seed: int = 0) -> Sequence[Array]:
    """Images to calibrate INT8 with, from the training images: never those to validate or test with.

    Where anomalib splits the images at random, give the data module the ``seed`` of the training's, or its split is
    another than the training's.

    Args:
        datamodule: The data; they are prepared and set up where they are not yet.
        count: Number of images, at most; half of them have a fractal anomaly.
        seed: Seed of the choice and of the anomalies, and of how data that are set up here are split.

    Returns:
        Arrays (1, 3, H, W), values in [0, 1], without the data module's augmentations: as inference sees images. They
        are read one by one.

    Raises:
        ValueError: If ``count`` is below 2, or there are no training images.
    """
    if count < 2:
        msg = f"count is {count}; calibration takes at least one normal and one anomalous image"
        raise ValueError(msg)
    dataset = _images(datamodule, "train_data", seed)
    if not len(dataset):
        msg = "INT8 is calibrated with training images, and the data module has none"
        raise ValueError(msg)
    return CalibrationImages(dataset, count, seed)


def plain(dataset: Any) -> Any:
    """A data set without its augmentations.

    Args:
        dataset: A data set of anomalib's; it stays as it is.
    """
    if getattr(dataset, "augmentations", None) is None:
        return dataset
    dataset = copy.copy(dataset)
    dataset.augmentations = None
    return dataset


def _images(datamodule: AnomalibDataModule | None, name: str, seed: int = 0) -> Any:
    if datamodule is None:
        msg = "INT8 is calibrated with training images: give the export a datamodule (with the program, --data)"
        raise ValueError(msg)
    if not hasattr(datamodule, name):
        datamodule.prepare_data()
        with seeded(seed):  # anomalib may split data at random, by no seed of its own
            datamodule.setup("fit")
    return getattr(datamodule, name, ())


def quantize(model: "Model", images: Iterable[Array]) -> "Model":
    """Quantize the convolutions between features to INT8, by NNCF's post-training quantization.

    These stay in floating point, which costs next to no time: convolutions of images and of anomaly maps, with at most
    three channels, depthwise convolutions of what is about half as large as the image or larger, and what is no
    convolution. Faint defects are steps of one or two gray levels, and 256 levels over the range of all images swallow
    them.

    Args:
        model: An exported network.
        images: Arrays (1, 3, H, W), values in [0, 1], to calibrate with. Where the network takes one size of image,
            they are resized to it, and where it takes a batch, each is repeated.

    Returns:
        The quantized network.

    Raises:
        ValueError: If values of the network are NaN, as are thresholds before a validation: OpenVINO could not load it.
    """
    import nncf  # noqa: PLC0415

    _refuse_nan(model)
    return _follow(_recipe(model, images), nncf.quantize)


def quantize_weights(model: "Model") -> "Model":
    """Store the weights of the convolutions that :func:`quantize` takes in 8 bits; all is computed in floating point.

    Args:
        model: An exported network.

    Returns:
        The compressed network.
    """
    import nncf  # noqa: PLC0415

    with quiet():
        return nncf.compress_weights(model, ignored_scope=_ignored_scope(model))


def quantize_within_drop(
    model: "Model",
    datamodule: AnomalibDataModule,
    metric: Metric | None = None,
    max_drop: float = 0.01,
) -> "Model":
    """Quantize like :func:`quantize`, and take back what costs the metric more than a drop (NNCF's accuracy control).

    Args:
        model: An exported network.
        datamodule: Training images to calibrate with, and validation images for the metric.
        metric: A metric of anomalib's, the higher the better; left out, F1 of images.
        max_drop: How much the metric may lose, in [0, 1].

    Returns:
        The quantized network.

    Raises:
        ValueError: If ``max_drop`` is out of range, there are no images, or values of the network are NaN.
    """
    import nncf  # noqa: PLC0415

    check_validation(datamodule, max_drop)
    _refuse_nan(model)
    images, validation = calibration_images(datamodule), _images(datamodule, "val_data")
    metric = F1Score(fields=["pred_label", "gt_label"]) if metric is None else metric
    control = {
        "validation_dataset": nncf.Dataset(_Items(plain(validation))),
        "validation_fn": _measure_with(metric, model),
        "max_drop": max_drop,
    }
    return _follow({**_recipe(model, images), **control}, nncf.quantize_with_accuracy_control)


def check_validation(datamodule: AnomalibDataModule | None, max_drop: float) -> None:
    """Refuse what :func:`quantize_within_drop` cannot work with.

    Args:
        datamodule: Images to calibrate with and to validate on.
        max_drop: How much the metric may lose.

    Raises:
        ValueError: If there are no images, or ``max_drop`` is out of range.
    """
    calibration_images(datamodule)
    if not 0 <= max_drop <= 1:
        msg = f"max_drop is {max_drop}; it must be in [0, 1] (0.01 lets the metric lose one hundredth)"
        raise ValueError(msg)
    if not len(_images(datamodule, "val_data")):
        msg = "INT8_ACQ measures on validation images, and the data module has none: choose another val_split_mode"
        raise ValueError(msg)


def _recipe(model: "Model", images: Iterable[Array]) -> dict[str, Any]:
    """Arguments of NNCF's quantization, the same with and without accuracy control."""
    import nncf  # noqa: PLC0415

    return {
        "model": model,
        "calibration_dataset": nncf.Dataset(images, lambda image: fit(image, model)),
        "subset_size": _length(images),
        "ignored_scope": _ignored_scope(model),
        "fast_bias_correction": False,
    }


class _Items:
    """Items of a data set, as an iterable."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return (self.dataset[i] for i in range(len(self.dataset)))

    def __len__(self) -> int:
        return len(self.dataset)


def _measure_with(metric: Metric, model: "Model") -> Callable[[Any, Iterable[Any]], float]:
    def measure(network: Any, items: Iterable[Any]) -> float:
        metric.reset()
        for item in items:
            found = network(fit(item.image.unsqueeze(0).numpy(), model))
            outputs = {output.any_name: torch.from_numpy(values[:1]) for output, values in found.items()}
            mask = None if item.gt_mask is None else item.gt_mask.unsqueeze(0)
            if mask is not None and "anomaly_map" in outputs:
                size = list(outputs["anomaly_map"].shape[-2:])
                mask = resize(mask.float(), size, InterpolationMode.NEAREST_EXACT).bool()
            fields: dict[str, Any] = {key: outputs[key] for key in {"anomaly_map", "pred_mask"} & outputs.keys()}
            fields |= {key: outputs[key].flatten() for key in {"pred_score", "pred_label"} & outputs.keys()}
            label = torch.as_tensor(item.gt_label).flatten()
            metric.update(ImageBatch(image=item.image.unsqueeze(0), gt_label=label, gt_mask=mask, **fields))
        return float(metric.compute())

    return measure


def _refuse_nan(model: "Model") -> None:
    constants = [node.data for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    if any(np.isnan(value).any() for value in constants if value.dtype.kind == "f"):
        msg = "INT8 needs thresholds, and this model was never validated (or its weights are NaN): run engine.validate"
        raise ValueError(msg)


def _ignored_scope(model: "Model") -> Any:
    import nncf  # noqa: PLC0415

    operations = model.get_ordered_ops()
    types = {operation.get_type_name() for operation in operations}
    return nncf.IgnoredScope(
        types=sorted(types - CONVOLUTIONS - {"Constant", "Parameter", "Result"}),
        names=_in_floating_point(model),
        validate=False,
    )


def _in_floating_point(model: "Model") -> list[str]:
    """Names of the convolutions that are left as they are; see :func:`quantize`."""
    shape = model.input(0).get_partial_shape()
    if shape.is_dynamic:
        model = model.clone()
        model.reshape([_length_of(*pair) for pair in zip(shape, (1, IMAGE_CHANNELS, *_ANY_SIZE), strict=True)])
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() in CONVOLUTIONS]
    height = max((_height(node) for node in convolutions if _channels(node) == IMAGE_CHANNELS), default=math.inf)
    return [
        node.get_friendly_name()
        for node in convolutions
        # Half of the height, or a little less: images may be padded before their convolution, or not at all.
        if _channels(node) <= IMAGE_CHANNELS or (_is_depthwise(node) and 3 * _height(node) >= height)
    ]


def _channels(convolution: Any) -> float:
    return _length_of(convolution.get_input_partial_shape(0)[1], math.inf)


def _height(convolution: Any) -> float:
    """Height of what a convolution reads; 0 where it is not known, or there is none."""
    shape = convolution.get_input_partial_shape(0)
    return _length_of(shape[2], 0) if len(shape) == 4 else 0


def _is_depthwise(convolution: Any) -> bool:
    # Weights are (groups, channels out of each, channels into each, ...).
    is_grouped = convolution.get_type_name() == "GroupConvolution"
    return is_grouped and _length_of(convolution.get_input_partial_shape(1)[2], math.inf) == 1


def _length_of(dimension: Any, unknown: float) -> float:
    return dimension.get_length() if dimension.is_static else unknown


def fit(image: Array, model: "Model") -> Array:
    """An image as the network takes it: of its size, where it has one, and as many as its batch.

    Args:
        image: (1, 3, H, W).
        model: The network.

    Returns:
        (B, 3, H', W').
    """
    batch, _, *sides = model.input(0).get_partial_shape()
    if all(side.is_static for side in sides):
        size = [side.get_length() for side in sides]
        if list(image.shape[-2:]) != size:
            resized: Tensor = resize(torch.from_numpy(image), size, antialias=True)
            image = resized.numpy()
    return np.repeat(image, batch.get_length(), axis=0) if batch.is_static else image


def _follow(recipe: dict[str, Any], quantization: Callable[..., "Model"]) -> "Model":
    """Quantize, if need be with a simpler correction of biases.

    NNCF corrects them layer by layer, and in some networks, as with ADPS and a ResNet-D, loses track of a layer beside
    another one.
    """
    with quiet():
        try:
            return quantization(**recipe)
        except KeyError as fault:
            logger.warning("NNCF cannot correct biases layer by layer here (it misses %s); it does so at once", fault)
            return quantization(**{**recipe, "fast_bias_correction": True})


def _length(images: Iterable[Array]) -> int:
    return len(images) if isinstance(images, Sequence) else 300
