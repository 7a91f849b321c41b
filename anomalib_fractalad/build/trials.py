# SPDX-License-Identifier: Apache-2.0
"""Good images with synthetic defects in them, to tell models apart and to show what a model finds."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_dtype, to_image, to_pil_image

from anomalib_fractalad.image_files import open_rgb
from anomalib_fractalad.transforms.foreground import object_mask

from .defects import DEFECTS, SMALLEST, VISIBLE
from .look import Kind

SEVERITIES = (1.0, 0.6, 0.35)
_LONGEST = 512  # pixels of the longer side of an image that a defect is made in
_DRAWS = 8
_ON_PART = 0.5  # share of a defect that lies on the object, or in the region of interest
_PRIME = 1_000_003


@dataclass(frozen=True)
class Trial:
    """A good image, or one with a synthetic defect.

    Attributes:
        file: The image, a PNG.
        mask: The defect's mask, or none for a good image.
        source: Number of the good image that it was made of.
        kind: Kind of defect, or none.
        severity: Share of the defect's full strength.
    """

    file: str
    mask: str | None
    source: int
    kind: str | None = None
    severity: float = 0.0


def make_trials(
    files: Sequence[Path],
    folder: Path,
    *,
    kind: Kind,
    count: int,
    seed: int = 0,
    region: Callable[[tuple[int, int]], Tensor] | None = None,
    show: Callable[[str], None] = lambda _: None,
) -> list[Trial]:
    """Write good images and their versions with defects, all ten kinds in turn, at three severities.

    Trials that are in the folder already are taken as they are. The same images and seed give the same defects.

    Args:
        files: Good images.
        folder: Where they are written.
        kind: What the images show; on an object, defects lie on the object.
        count: Number of defects, about.
        seed: Seed of the defects' places and shapes.
        region: Gives the region of interest (H, W), boolean, at a height and width; defects lie in it.
        show: Called with how far it is.

    Returns:
        Good images first. Defects that would not be seen are left out.
    """
    index = folder / "trials.json"
    if index.exists():
        return [Trial(**entry) for entry in json.loads(index.read_text(encoding="utf-8"))]
    folder.mkdir(parents=True, exist_ok=True)
    each = max(1, math.ceil(count / len(files)))
    good: list[Trial] = []
    bad: list[Trial] = []
    for source, file in enumerate(files):
        show(f"making defects in image {source + 1} of {len(files)}")
        image = read_small(file)
        good.append(Trial(_write(image, folder / f"{source:03}_good.png"), None, source))
        place = _place(image, kind, region)
        for number in range(source * each, (source + 1) * each):
            name, severity = _turn(number, seed)
            made = _make(image, name, severity, _PRIME * (seed + 1) + number, place)
            if made is not None:
                stem = f"{source:03}_{number:05}_{name.replace(' ', '_')}"
                paths = _write(made[0], folder / f"{stem}.png"), _write(made[1].float(), folder / f"{stem}_mask.png")
                bad.append(Trial(*paths, source, name, severity))
    trials = [*good, *bad]
    index.write_text(json.dumps([asdict(trial) for trial in trials], indent=1), encoding="utf-8")
    return trials


def read_small(file: Path) -> Tensor:
    """Read an image (3, H, W), values in [0, 1], at most 512 pixels on its longer side and at least 64 on its shorter.

    Raises:
        UnreadableImageError: If it cannot be read.
    """
    image = to_image(open_rgb(file))
    height, width = image.shape[-2:]
    scale = min(1.0, _LONGEST / max(height, width))
    size = [max(SMALLEST, round(length * scale)) for length in (height, width)]
    small: Tensor = to_dtype(resize(image, size, antialias=True), torch.float32, scale=True)
    return small


def _turn(number: int, seed: int) -> tuple[str, float]:
    """Kind and severity of a defect: all kinds in turn, in another order each time, so that no image has its own."""
    kinds = list(DEFECTS)
    turn, place = divmod(number, len(kinds))
    kind = random.Random(_PRIME * seed + turn).sample(range(len(kinds)), len(kinds))[place]  # noqa: S311
    return kinds[kind], SEVERITIES[(turn + kind) % len(SEVERITIES)]


def _place(image: Tensor, kind: Kind, region: Callable[[tuple[int, int]], Tensor] | None) -> Tensor | None:
    """Where defects may lie (1, H, W); none for anywhere."""
    size = (image.shape[-2], image.shape[-1])
    inside = None if region is None else region(size).unsqueeze(0)
    if kind != "object":
        return inside
    on_object = object_mask(image.unsqueeze(0)).squeeze(0)
    return on_object if inside is None else on_object & inside


def _make(image: Tensor, name: str, severity: float, seed: int, place: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """A defect that can be seen and lies where it may, or none."""
    for draw in range(_DRAWS):
        painted, mask = DEFECTS[name](image, severity, seed + draw * 7919)
        if not mask.any() or (painted - image).abs().amax() <= 2 * VISIBLE:
            continue
        if place is None or (mask & place).sum() >= _ON_PART * mask.sum():
            return painted, mask
    return None


def _write(image: Tensor, file: Path) -> str:
    to_pil_image(image).save(file, compress_level=1)
    return str(file)
