# SPDX-License-Identifier: Apache-2.0
"""The folder that a part is inspected with: exported networks, what is known of them, and ``inspect.py``."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.post_processing import PostProcessor
from torchvision.transforms.v2 import Resize

from anomalib_fractalad.export.int8 import calibration_images, quantize
from anomalib_fractalad.export.openvino import decide_constant_choices, mark_as_own
from anomalib_fractalad.export.pre_processing import steps_of
from anomalib_fractalad.export.threshold import set_threshold

from .export_check import FILES, FP32, INT8, ONNX, check_exports
from .standalone import standalone

if TYPE_CHECKING:
    from anomalib_fractalad.models.components.lightning_module import OneClassModule

logger = logging.getLogger(__name__)

FORMAT = 1
READING = (
    "RGB of 8 bits; gray levels of 16 bits are divided by 256, alpha is dropped, palettes are resolved, and EXIF "
    "orientation is not applied; values are divided by 255"
)
PACKAGES = ("anomalib-fractalad", "anomalib", "torch", "openvino", "nncf", "numpy", "pillow")


def export_part(
    model: "OneClassModule",
    datamodule: AnomalibDataModule,
    folder: str | Path,
    images: Sequence[str | Path] | None = None,
    *,
    int8: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Export a trained model to a part folder, and check what was exported against torch.

    The folder gets ``model/`` with OpenVINO networks in FP32 and INT8 and an ONNX network, ``inspect.py`` and
    ``part.json``. Region of interest, thresholds and normalization are inside the networks. INT8 is used if it decides
    about each image as torch does. Where a network puts the very image whose score is the threshold above it, its
    threshold is raised to that image's score, so that no more good images raise an alarm than were promised.

    Args:
        model: A model of this package, trained and validated.
        datamodule: Its data, set up; training images calibrate INT8.
        folder: The folder; made if it is not there. Other files in it stay.
        images: Image files to check with, also anomalous ones where there are some; left out, the good validation
            images.
        int8: Export to INT8, too.
        extra: Plain data to keep in ``part.json`` under ``extra``.

    Returns:
        The content of ``part.json``: ``network`` (the file to use), ``files``, ``image`` (height and width that the
        network sees, and how images are read), ``roi``, ``threshold``, ``false_alarms``, ``check`` (for each export the
        largest difference of a score and of a map from torch's, both normalized, its threshold, and the images that
        are decided otherwise), ``int8``, ``versions`` and ``extra``.

    Raises:
        ValueError: If the model has no thresholds, its pre-processor does more than resize to one size, or there are
            no images.
    """
    folder = Path(folder)
    _check_model(model)
    paths = _images_to_check(datamodule, images)
    part = _describe(model, extra)
    files = _export(model, datamodule, folder, int8=int8)
    (folder / "inspect.py").write_text(standalone(), encoding="utf-8")
    part["files"] = {name: FILES[name] for name in files}
    _write(folder, part)
    logger.info("Checking the exported networks on %d images", len(paths))
    part["check"] = check_exports(model, folder, list(files), paths, {*map(Path, good_validation_images(datamodule))})
    part["int8"] = _choose_int8(part["check"], wanted=int8)
    _choose_network(folder, part)
    _write(folder, part)
    logger.info("%s holds the part: %s", folder, part["int8"]["reason"])
    return part


def good_validation_images(datamodule: AnomalibDataModule) -> list[str]:
    """Files of the good images that a data module validates with.

    Args:
        datamodule: The data; set up.
    """
    samples = getattr(getattr(datamodule, "val_data", None), "samples", None)
    return [] if samples is None else list(samples["image_path"][samples["label_index"] == 0])


def _images_to_check(datamodule: AnomalibDataModule, images: Sequence[str | Path] | None) -> list[Path]:
    paths = [Path(path) for path in (good_validation_images(datamodule) if images is None else images)]
    if not paths:
        msg = "there are no images to check the exported networks with: give images, or good validation images"
        raise ValueError(msg)
    return paths


def _check_model(model: "OneClassModule") -> None:
    post_processor = model.post_processor
    if not isinstance(post_processor, PostProcessor) or bool(post_processor.image_threshold.isnan()):
        msg = f"{model.name} has no thresholds, so it cannot decide: run engine.validate before"
        raise ValueError(msg)
    transform = getattr(model.pre_processor, "transform", None)
    steps = [] if transform is None else list(steps_of(transform))
    if model.input_size is None or not all(isinstance(step, Resize) for step in steps):
        msg = (
            f"the pre-processor's {transform} cannot be used in a part folder, which finds defects in the original "
            "image: take a Resize to one height and width, as in configure_pre_processor((256, 256))"
        )
        raise ValueError(msg)


def _describe(model: "OneClassModule", extra: Mapping[str, Any] | None) -> dict[str, Any]:
    post_processor: Any = model.post_processor
    region = getattr(model.model, "region", None)
    size = model.input_size
    return {
        "format": FORMAT,
        "model": model.name,
        "network": FILES[FP32],
        "files": {},
        "image": {"size": None if size is None else list(size), "reading": READING},
        "roi": None if region is None else {"size": list(region.source_size), "share": region.share},
        "threshold": {
            "image": float(post_processor.normalized_image_threshold),
            "pixel": float(post_processor.normalized_pixel_threshold),
            "raw_image": float(post_processor.image_threshold),
            "raw_pixel": float(post_processor.pixel_threshold),
        },
        "false_alarms": getattr(post_processor, "calibration", None),
        "versions": {name.replace("-", "_"): _version(name) for name in PACKAGES},
        "extra": dict(extra or {}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(folder: Path, part: Mapping[str, Any]) -> None:
    temporary = folder / "part.json.new"
    temporary.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "part.json")


def _export(model: "OneClassModule", datamodule: AnomalibDataModule, folder: Path, *, int8: bool) -> list[str]:
    import openvino  # noqa: PLC0415

    target = folder / "model"
    target.mkdir(parents=True, exist_ok=True)
    logger.info("Exporting to ONNX and OpenVINO")
    with TemporaryDirectory() as temporary:
        onnx = model.to_onnx(temporary)
        network = openvino.convert_model(onnx, extension=[decide_constant_choices()])
        openvino.save_model(network, folder / FILES[FP32], compress_to_fp16=False)
        for file in onnx.parent.iterdir():  # weights may lie beside it
            shutil.copyfile(file, target / file.name)
    mark_as_own(folder / FILES[FP32])
    if not int8 or find_spec("nncf") is None:
        return [FP32, ONNX]
    logger.info("Quantizing to INT8")
    quantized = quantize(network, calibration_images(datamodule))
    openvino.save_model(quantized, folder / FILES[INT8], compress_to_fp16=False)
    mark_as_own(folder / FILES[INT8])
    return [FP32, INT8, ONNX]


def _choose_network(folder: Path, part: dict[str, Any]) -> None:
    """Name the network to use, and raise the thresholds of those whose rounding asks for it."""
    chosen = INT8 if part["int8"]["taken"] else FP32
    part["network"] = FILES[chosen]
    for name in part["files"]:
        checked = part["check"][name]
        if checked is not None and checked["threshold"] > part["threshold"]["image"]:
            set_threshold(folder / FILES[name], checked["threshold"])
    part["threshold"]["image"] = part["check"][chosen]["threshold"]


def _choose_int8(check: Mapping[str, Any], *, wanted: bool) -> dict[str, Any]:
    if not wanted:
        return {"taken": False, "reason": "INT8 was not asked for"}
    if INT8 not in check:
        return {"taken": False, "reason": "INT8 needs NNCF, which is not installed"}
    changed, images = len(check[INT8]["decisions_changed"]), check["images"]
    if changed:
        return {"taken": False, "reason": f"INT8 decides otherwise about {changed} of {images} images: FP32 is used"}
    return {"taken": True, "reason": f"INT8 keeps the decision about each of {images} images"}
