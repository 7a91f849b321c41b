# SPDX-License-Identifier: Apache-2.0
"""A first look at a folder of good images: what is in it, and what follows from that."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from anomalib_fractalad.image_files import Overview, UnreadableImageError, check_image, overview
from anomalib_fractalad.transforms.foreground import object_mask

from .files import image_files, same_contents
from .groups import Grouping, group_images, two_kinds

Kind = Literal["object", "texture"]

SMALL = 64  # side in pixels of the versions that images are compared by
_BYTES = 4_000_000_000  # of a folder that is looked at as a whole
_THREADS = 4
_MANY = 500  # images from which on progress is shown
_SAMPLE = 200  # images that tell an object from a texture
_DARK, _BRIGHT = 25, 230  # mean gray levels, of 255
_GRAY = 3  # levels that the channels of a gray image differ by at most
_EDGE = 2  # pixels of the small version


@dataclass(frozen=True)
class Look:
    """What is known of a folder of good images.

    Attributes:
        folder: The folder.
        files: The images that can be used, sorted; of files with the same contents, the first.
        grouping: Which of them show the same part.
        kind: ``object`` for single objects on a plain background, or ``texture``.
        size: Median width and height in pixels.
        sizes: Numbers of images by width and height; of those that were looked at.
        is_gray: Whether no image has color.
        brightness: Lowest, median and highest mean gray level, of 255.
        side: 0 or 1 for each file where they seem to show two kinds of view, else 0.
        unreadable: What is wrong with files that cannot be read, by file.
        duplicates: Files with the same contents, in groups.
        looked_at: Number of images that were decoded.
        warnings: What a person should know, a sentence or two each.
    """

    folder: Path
    files: tuple[Path, ...]
    grouping: Grouping
    kind: Kind
    size: tuple[int, int]
    sizes: dict[tuple[int, int], int]
    is_gray: bool
    brightness: tuple[float, float, float]
    side: tuple[int, ...]
    unreadable: dict[Path, str] = field(default_factory=dict)
    duplicates: list[list[Path]] = field(default_factory=list)
    looked_at: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def parts(self) -> int:
        """Number of parts, as far as groups tell."""
        return len(set(self.grouping.part_of))

    def summary(self) -> list[str]:
        """A few lines for people."""
        width, height = self.size
        low, middle, high = self.brightness
        sizes = "" if len(self.sizes) == 1 else f" (median of {len(self.sizes)} sizes)"
        color = "gray" if self.is_gray else "color"
        lines = [
            f"{len(self.files)} images of {self.parts} parts ({self.grouping.how})",
            f"{width} x {height} pixels{sizes}, {color}, levels {low:.0f} to {high:.0f}, median {middle:.0f} of 255",
            "an object on a plain background" if self.kind == "object" else "a texture, or a part that fills the image",
        ]
        return lines + [f"note: {warning}" for warning in self.warnings]

    def as_json(self) -> dict[str, Any]:
        """The summary as plain data."""
        return {
            "folder": str(self.folder),
            "images": len(self.files),
            "parts": self.parts,
            "grouped_by": self.grouping.how,
            "kind": self.kind,
            "size": self.size,
            "sizes": {f"{width}x{height}": count for (width, height), count in self.sizes.items()},
            "is_gray": self.is_gray,
            "brightness": self.brightness,
            "unreadable": {str(file): problem for file, problem in self.unreadable.items()},
            "duplicates": [[str(file) for file in group] for group in self.duplicates],
            "warnings": self.warnings,
        }


def look(folder: Path, group: str | None = None, leave_out: Iterable[Path] = ()) -> Look:
    """Look at a folder of good images and its sub-folders.

    Of a folder above 4 GB, an evenly spread part is decoded, and of the rest it is checked that files begin and end as
    images do. Memory grows by some 60 kB for each image.

    Args:
        folder: The folder.
        group: Regular expression that finds the name of an image's part in its path below the folder: its first
            group, or all that it matches. Left out, parts are told by names and by near-duplicate images.
        leave_out: Folders that are not searched.

    Raises:
        ValueError: If there is no image that can be read, or the expression is wrong or matches none.
    """
    pattern = _compiled(group)
    files = image_files(folder, leave_out)
    duplicates = same_contents(files)
    repeated = {file for same in duplicates for file in same[1:]}
    seen, unreadable = _overviews([file for file in files if file not in repeated])
    if not seen:
        msg = f"none of the {len(files)} images of {folder} can be read: {next(iter(unreadable.values()))}"
        raise ValueError(msg)
    usable = tuple(seen)
    looked = {file: found for file, found in seen.items() if found is not None}
    small = np.stack([found.small for found in looked.values()])
    gray = _gray(small)
    grouping = group_images(folder, usable, dict(zip(looked, gray, strict=True)), pattern)
    sides = dict(zip(looked, two_kinds(gray), strict=True))
    sizes = Counter(found.size for found in looked.values()).most_common()
    levels = small.mean(axis=(1, 2, 3))
    found = Look(
        folder,
        usable,
        grouping,
        _kind(small),
        (int(np.median([found.size[0] for found in looked.values()])), _median_height(looked.values())),
        dict(sizes),
        bool(np.ptp(small.astype(np.int16), axis=3).max() <= _GRAY),
        (float(levels.min()), float(np.median(levels)), float(levels.max())),
        tuple(sides.get(file, 0) for file in usable),
        unreadable,
        duplicates,
        len(looked),
    )
    return Look(**{**vars(found), "warnings": tuple(_warnings(found, looked, levels))})


def _compiled(group: str | None) -> re.Pattern[str] | None:
    try:
        return None if group is None else re.compile(group)
    except re.error as error:
        msg = f"--group {group!r} is no regular expression ({error}); for example: '^(part[0-9]+)_'"
        raise ValueError(msg) from None


def _median_height(looked: Any) -> int:
    return int(np.median([found.size[1] for found in looked]))


def _overviews(files: Sequence[Path]) -> tuple[dict[Path, Overview | None], dict[Path, str]]:
    """What each readable file is like, none where it was only checked, and what is wrong with the others."""
    step = sum(file.stat().st_size for file in files) // _BYTES + 1

    def read(index: int) -> Overview | str | None:
        try:
            if index % step == 0:
                return overview(files[index], SMALL)
            check_image(files[index], decode=False)
        except (UnreadableImageError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(read, range(len(files)))
        shown = tqdm(
            results,
            "looking at images",
            len(files),
            disable=None if len(files) >= _MANY else True,
            leave=False,
            unit="image",
        )
        found = dict(zip(files, shown, strict=True))
    unreadable = {file: result for file, result in found.items() if isinstance(result, str)}
    return {file: result for file, result in found.items() if not isinstance(result, str)}, unreadable


def _gray(small: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.asarray(small.mean(axis=3, dtype=np.float32))


def _kind(small: npt.NDArray[np.uint8]) -> Kind:
    """An object covers a part of most images, not their edges, and what is around it is of one brightness."""
    step = max(1, len(small) // _SAMPLE)
    images = torch.from_numpy(small[::step]).permute(0, 3, 1, 2).float() / 255
    masks = object_mask(images).squeeze(1)
    edge = torch.ones(SMALL, SMALL, dtype=torch.bool)
    edge[_EDGE:-_EDGE, _EDGE:-_EDGE] = False
    share = masks.float().mean(dim=(1, 2))
    on_edge = masks[:, edge].float().mean(dim=1)
    spread = images.mean(dim=1)[:, edge].std(dim=1)
    is_object = (share > 0.02) & (share < 0.85) & (on_edge < 0.1) & (spread < 0.08)
    return "object" if is_object.float().mean() > 0.8 else "texture"


def _warnings(found: Look, looked: dict[Path, Overview], levels: npt.NDArray[Any]) -> list[str]:
    warnings = []
    if found.unreadable:
        first = next(iter(found.unreadable.values()))
        warnings.append(f"{len(found.unreadable)} files cannot be read and are left out. The first: {first}")
    if found.duplicates:
        extra = sum(len(group) - 1 for group in found.duplicates)
        names = " and ".join(file.name for file in found.duplicates[0][:2])
        warnings.append(f"{extra} files repeat another one's contents and are left out, as of {names}.")
    turned = [file.name for file, image in looked.items() if image.orientation != 1]
    if turned:
        warnings.append(
            f"{len(turned)} photographs are marked as turned (EXIF), such as {turned[0]}. The mark is not heeded: they "
            "are read as the sensor took them, here and at the line. Rotate the files themselves if parts lie askew."
        )
    modes = Counter(image.mode for image in looked.values())
    if len(modes) > 1:
        kinds = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        warnings.append(f"Pixel formats differ ({kinds}). All are read in RGB; take images as the camera will.")
    aspects = [width / height for width, height in found.sizes]
    if max(aspects) > 1.1 * min(aspects):
        warnings.append("Proportions differ. All images are stretched to one size: crop them to the part if you can.")
    for name, count in (("dark", (levels < _DARK).sum()), ("bright", (levels > _BRIGHT).sum())):
        if 0 < count < len(levels) / 2:
            index = int(levels.argmin() if name == "dark" else levels.argmax())
            warnings.append(f"{count} images are nearly all {name}, such as {list(looked)[index].name}. Are they good?")
    if any(found.side):
        count = min(sum(found.side), len(found.side) - sum(found.side))
        warnings.append(
            f"The images fall into two kinds, {len(found.side) - count} and {count}, as of two sides of a part. One "
            "model learns both. If the line knows which it sees, a model for each finds more."
        )
    if found.looked_at < len(found.files):
        warnings.append(
            f"{found.looked_at} of the images were decoded, evenly spread. Near-duplicates of the others are not known."
        )
    return warnings
