# SPDX-License-Identifier: Apache-2.0
"""The models that a build chooses from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentError, ArgumentParser

from .look import Look

FILE = Path(__file__).with_name("candidates.yaml")
BACKBONE = "tf_efficientnet_lite0"
_MULTIPLE = 32  # pixels: the coarsest stride of a backbone
_SQUARE = 1.25  # proportions up to which images are taken to be square


@dataclass(frozen=True)
class Candidate:
    """A model that may be chosen.

    Attributes:
        name: What it is called.
        class_path: The model's class.
        init_args: Its arguments, without the score.
        scores: Ways from a map to a score; the model's own if there are none.
        steps: Steps of a whole training, or none if the model learns in one pass.
        batch_size: Images of a training step.
        image_size: Height and width that images are resized to.
        trains_on: Kinds of synthetic defects that its own training makes.
    """

    name: str
    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    scores: tuple[str, ...] = ()
    steps: int | None = None
    batch_size: int = 8
    image_size: tuple[int, int] = (256, 256)
    trains_on: tuple[str, ...] = ()

    def configuration(self, score: str | None = None, **arguments: Any) -> dict[str, Any]:
        """The model as anomalib's configurations have it.

        Args:
            score: Way from a map to a score; left out, the first one.
            **arguments: More arguments, as plain data.

        Returns:
            ``class_path`` and ``init_args``.
        """
        score = score or next(iter(self.scores), None)
        resize = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": list(self.image_size)}}
        pre_processor = {"class_path": "anomalib.pre_processing.PreProcessor", "init_args": {"transform": resize}}
        chosen = {} if score is None else {"score": score}
        given = {**self.init_args, **chosen, "pre_processor": pre_processor, **arguments}
        return {"class_path": self.class_path, "init_args": given}

    def build(self, score: str | None = None, **arguments: Any) -> AnomalibModule:
        """Make the model; see :meth:`configuration`.

        Raises:
            ValueError: If an argument is wrong.
            RuntimeError: If the pre-trained weights cannot be loaded.
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--model", type=AnomalibModule)
        try:
            parsed = parser.parse_object({"model": self.configuration(score, visualizer=False, **arguments)})
        except ArgumentError as error:
            msg = f"candidate {self.name!r}: {' '.join(str(error).split())}"
            raise ValueError(msg) from None
        model: AnomalibModule = parser.instantiate_classes(parsed).model
        return model


def candidates(found: Look, common: Mapping[str, Any], file: Path | None = None) -> list[Candidate]:
    """The candidates that suit the images.

    Args:
        found: The images.
        common: Arguments of all models, such as the backbone; those that a candidate names itself go first.
        file: A file like candidates.yaml beside this one, in its place.

    Raises:
        ValueError: If the file is wrong, or no candidate suits.
    """
    entries = _read(file or FILE)
    suitable = [entry for entry in entries if _suits(entry, found)]
    if not suitable:
        msg = f"no candidate of {file} suits the images ({found.kind}, {found.size[0]} x {found.size[1]} pixels)"
        raise ValueError(msg)
    return [_candidate(entry, found, common) for entry in suitable]


_KEYS = {"model", "size", "suits", "larger_than"} | {entry.name for entry in fields(Candidate)}


def _read(file: Path) -> Sequence[dict[str, Any]]:
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        msg = f"the candidates cannot be read: {' '.join(str(error).split())}"
        raise ValueError(msg) from None
    if not isinstance(entries, list) or not entries:
        msg = f"{file} holds no list of candidates; {FILE} shows one"
        raise ValueError(msg)
    for entry in entries:
        missing = [key for key in ("name", "model") if not isinstance(entry, dict) or key not in entry]
        unknown = [] if missing else sorted(entry.keys() - _KEYS)
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is unknown"
            msg = f"a candidate of {file} {what}: {entry}; {FILE} shows how it is written"
            raise ValueError(msg)
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        msg = f"two candidates of {file} have the same name: {max(names, key=names.count)}"
        raise ValueError(msg)
    return entries


def _suits(entry: Mapping[str, Any], found: Look) -> bool:
    return bool(entry.get("suits", found.kind) == found.kind and min(found.size) > entry.get("larger_than", 0))


def _candidate(entry: Mapping[str, Any], found: Look, common: Mapping[str, Any]) -> Candidate:
    return Candidate(
        entry["name"],
        entry["model"]["class_path"],
        {**common, **entry["model"].get("init_args", {})},
        tuple(entry.get("scores", ())),
        entry.get("steps"),
        entry.get("batch_size", 8),
        image_size(entry.get("size", 256), found.size),
        tuple(entry.get("trains_on", ())),
    )


def image_size(side: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width with about as many pixels as a square, and the proportions of images.

    Args:
        side: Side of the square in pixels.
        size: Width and height of the images.

    Returns:
        Multiples of 32.
    """
    width, height = size
    aspect = width / height
    if max(aspect, 1 / aspect) <= _SQUARE:
        return side, side
    aspect = min(max(aspect, 0.25), 4)
    rows, columns = (max(1, round(length / _MULTIPLE)) for length in (side / aspect**0.5, side * aspect**0.5))
    return rows * _MULTIPLE, columns * _MULTIPLE
