# SPDX-License-Identifier: Apache-2.0
"""The choice of an anomaly generator: an object, or a description of one."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from jsonargparse import ArgumentError, ArgumentParser
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Transform

from anomalib_fractalad.training.random_state import seeded
from anomalib_fractalad.transforms import FractalAnomalyGenerator

# The annotation of a model's argument: jsonargparse explains mistakes well for these types, and badly for wider ones.
GeneratorChoice: TypeAlias = PerlinAnomalyGenerator | FractalAnomalyGenerator | str | None

KNOWN_GENERATORS: dict[str, type[Transform]] = {
    "PerlinAnomalyGenerator": PerlinAnomalyGenerator,
    "FractalAnomalyGenerator": FractalAnomalyGenerator,
}


class AnomalyGenerator:
    """Makes anomalies with the generator that a model's arguments choose.

    A checkpoint holds :attr:`spec`, plain data, in place of the generator. A model that is made from such a record does
    not build the generator before it is trained, so that a model is loaded for inference where its texture folder or
    its generator's code is missing. Only anomalib's Perlin and this package's fractal generator are built from a
    record; any other has to be given as an object again, and training without it is refused.

    Args:
        choice: A transform from image(s) in [0, 1] to (anomalous image(s), mask(s)), the name of a known generator, a
            description ``{"class_path": ..., "init_args": {...}}`` of one, the :attr:`spec` of a checkpoint, or
            ``None`` for anomalib's Perlin generator.
        anomaly_source_path: Folder of texture images for the Perlin generator, searched with its subfolders.
        probability: Share of the images, in [0, 1], that get an anomaly where ``choice`` is ``None``. A generator that
            is chosen keeps its own probability.

    Attributes:
        spec: The choice as plain data.

    Raises:
        TypeError: If ``choice`` is of another type.
        ValueError: If the generator is unknown, its arguments are wrong, it takes no texture images, or the folder
            holds none.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        choice: GeneratorChoice | Transform | Mapping[str, Any] = None,
        anomaly_source_path: str | Path | None = None,
        *,
        probability: float = 0.5,
    ) -> None:
        if isinstance(choice, DictConfig):
            choice = OmegaConf.to_container(choice, resolve=True)
        if choice is None:
            choice = {"class_path": "PerlinAnomalyGenerator", "init_args": {"probability": probability}}
        elif isinstance(choice, str):
            choice = {"class_path": choice}
        self._generator: Transform | None = None
        if isinstance(choice, Mapping) and choice.get("recorded"):
            self.spec = dict(choice)
            if anomaly_source_path is not None:
                self.spec["init_args"] = _add_source(dict(choice), anomaly_source_path)
            return
        if isinstance(choice, Mapping):
            self._generator = _build(choice, anomaly_source_path)
        elif not isinstance(choice, Transform):
            msg = (
                f"anomaly_generator is {choice!r}; it must be a torchvision v2 transform such as "
                f"{' or '.join(KNOWN_GENERATORS)}, the name of one of these, or its class_path and init_args"
            )
            raise TypeError(msg)
        elif anomaly_source_path is None:
            self._generator = choice
        else:
            self._generator = _build(_describe(choice), anomaly_source_path)
        self.spec = {**_describe(self._generator), "recorded": True}

    def prepare(self) -> None:
        """Build the generator, if it has not been: call this before training begins.

        Raises:
            ValueError: If the generator of the checkpoint that the model comes from cannot be built.
        """
        if self._generator is None:
            try:
                self._generator = _build(self.spec)
            except ValueError as error:
                msg = (
                    f"the anomaly generator that the checkpoint records cannot be built: {error}. To train on, pass "
                    "anomaly_generator (or anomaly_source_path) to load_from_checkpoint."
                )
                raise ValueError(msg) from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Make anomalies.

        Args:
            images: (B, C, H, W), values in [0, 1].

        Returns:
            The images with anomalies, (B, C, H, W), and their masks, (B, 1, H, W), values in [0, 1].

        Raises:
            ValueError: If the generator gives anything else.
        """
        self.prepare()
        result = self._generator(images)  # type: ignore[misc]
        size = (len(images), 1, *images.shape[-2:])
        if not isinstance(result, tuple) or [part.shape for part in result] != [images.shape, size]:
            msg = (
                f"{self.spec['class_path']} must turn images {tuple(images.shape)} into a tuple of anomalous images of "
                f"that shape and masks {size}"
            )
            raise ValueError(msg)
        anomalous, mask = result
        # Perlin noise without a texture image leaves [0, 1].
        return anomalous.to(images.dtype).clamp(0, 1), mask.to(images.dtype)


def _known_generator(class_path: str) -> type[Transform] | None:
    """The generator of this name, or of this name in anomalib or this package; nothing else is ever imported."""
    package, _, name = class_path.rpartition(".")
    return KNOWN_GENERATORS.get(name) if package.partition(".")[0] in {"", "anomalib", "anomalib_fractalad"} else None


def _build(choice: Mapping[str, Any], anomaly_source_path: str | Path | None = None) -> Transform:
    name = str(choice.get("class_path"))
    arguments = _add_source(choice, anomaly_source_path)
    generator_class = _known_generator(name)
    if generator_class is None or choice.keys() - {"class_path", "init_args", "recorded"}:
        msg = (
            f"anomaly_generator {dict(choice)!r} is unknown; use class_path (one of {', '.join(KNOWN_GENERATORS)}) and "
            "init_args, or pass any other generator as an object"
        )
        raise ValueError(msg)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(generator_class, "generator")
    try:
        config = parser.parse_object({"generator": arguments})
        # Perlin's generator draws a threshold when it is built. It must be the same in every process.
        with seeded(0):
            generator: Transform = parser.instantiate_classes(config).generator
    except ArgumentError as error:
        msg = f"anomaly_generator {name}: {error}"
        raise ValueError(msg) from error
    source = config.generator.get("anomaly_source_path")
    if source is not None and not generator.anomaly_source_paths:
        msg = (
            f"anomaly_source_path {str(source)!r} holds no images ({' '.join(IMG_EXTENSIONS)}); give a folder of "
            "texture images, or leave it out for anomalies from noise alone"
        )
        raise ValueError(msg)
    return generator


def _add_source(choice: Mapping[str, Any], anomaly_source_path: str | Path | None) -> dict[str, Any]:
    """Arguments of the generator, with the folder of texture images among them."""
    arguments = dict(choice.get("init_args") or {})
    if anomaly_source_path is None:
        return arguments
    if _known_generator(str(choice.get("class_path"))) is not PerlinAnomalyGenerator:
        msg = (
            f"anomaly_source_path is {str(anomaly_source_path)!r}, but {choice.get('class_path')} takes no texture "
            "images; leave it out or use PerlinAnomalyGenerator"
        )
        raise ValueError(msg)
    other = arguments.get("anomaly_source_path")
    if other is not None and Path(other) != Path(anomaly_source_path) and not choice.get("recorded"):
        msg = (
            f"two folders of texture images are given: anomaly_source_path {str(anomaly_source_path)!r} and the "
            f"generator's own {str(other)!r}; leave one out"
        )
        raise ValueError(msg)
    return {**arguments, "anomaly_source_path": str(anomaly_source_path)}


def _describe(generator: Transform) -> dict[str, Any]:
    """Class and arguments of a generator as plain data; no arguments where they cannot be told from the object."""
    kind = type(generator)
    if kind not in KNOWN_GENERATORS.values():
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": None}
    if isinstance(generator, PerlinAnomalyGenerator):
        sources = [path.parent for path in generator.anomaly_source_paths]
        arguments: dict[str, Any] = {
            "anomaly_source_path": os.path.commonpath(sources) if sources else None,
            "probability": generator.probability,
            "blend_factor": generator.blend_factor,
            "rotation_range": tuple(generator.perlin_rotation_transform.degrees),
            "dual_mask": generator.dual_mask,
        }
    else:
        arguments = {name: getattr(generator, name) for name in inspect.signature(kind).parameters}
    return {"class_path": kind.__name__, "init_args": arguments}
