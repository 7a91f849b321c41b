# SPDX-License-Identifier: Apache-2.0
"""Which images show the same part, by what they are called and by what they look like."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]

_ALIKE = 0.85  # correlation of what sets two images apart from the others
_HARDLY_DIFFERENT = 0.95
_LARGEST = 0.1  # share of the images that a group of near-duplicates may have
_PER_PART = 12  # images of one part, at most, for names to tell parts
_CHUNK = 512
_NAME_PARTS = re.compile(r"^(.+?)[ _.-]+\(?[^ _.-]+\)?$")
_APART = 5.0  # Ashman's D of two kinds of images; an even spread has 3.5
_FEWEST = 0.1  # share of the smaller kind


@dataclass(frozen=True)
class Grouping:
    """Which images show the same part.

    Attributes:
        part_of: Number of each image's part.
        how: How the parts were told, in a few words.
    """

    part_of: tuple[int, ...]
    how: str


def group_images(
    folder: Path, files: Sequence[Path], small: Mapping[Path, Images], pattern: re.Pattern[str] | None = None
) -> Grouping:
    """Tell which images show the same part.

    Args:
        folder: What the names of the files are below of.
        files: The images.
        small: Small gray versions (side, side) of as many of them as are known, by file.
        pattern: Finds the part's name in a file's path below the folder; near-duplicates do not count then.

    Raises:
        ValueError: If the pattern matches no file.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    if pattern is not None:
        return _by_pattern(names, pattern)
    keys, how = _by_name(names)
    joined = _Joined(len(files))
    first: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        joined.join(index, first.setdefault(key, index))
    place = {file: index for index, file in enumerate(files)}
    pairs = near_duplicates(np.stack([small[file] for file in files if file in small]))
    known = [place[file] for file in files if file in small]
    for one, other in pairs:
        joined.join(known[one], known[other])
    if pairs:
        how = f"{how} and near-duplicates" if how else "near-duplicates count as one part"
    return Grouping(joined.numbers(), how or "each image counts as a part of its own")


def _by_pattern(names: Sequence[str], pattern: re.Pattern[str]) -> Grouping:
    found = [pattern.search(name) for name in names]
    if not any(found):
        msg = f"--group {pattern.pattern!r} matches no image, such as {names[0]}; it must find the part's name in it"
        raise ValueError(msg)
    keys = [
        (match[1] if pattern.groups and match[1] is not None else match[0]) if match else (name,)
        for match, name in zip(found, names, strict=True)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    alone = sum(match is None for match in found)
    how = f"by --group{f'; {alone} that it does not match count as one each' if alone else ''}"
    return Grouping(tuple(numbers[key] for key in keys), how)


def _by_name(names: Sequence[str]) -> tuple[Sequence[Hashable], str]:
    """Parts told by folders of few images, or by names with a common beginning, where there are."""
    ways: list[tuple[str, Callable[[str], Hashable]]] = [
        ("folders count as parts", lambda name: name.rpartition("/")[0] or (name,)),
        ("names with a common stem count as one part", _stem),
    ]
    for how, key in ways:
        keys = [key(name) for name in names]
        sizes = Counter(keys).values()
        if 1 < max(sizes) <= _PER_PART and len(sizes) >= len(names) ** 0.5:
            return keys, how
    return names, ""


def _stem(name: str) -> Hashable:
    """A name without its last word, but not without its only number: image_0001 is its own stem."""
    stem = name.rpartition(".")[0]
    match = _NAME_PARTS.match(stem)
    return match[1] if match and any(map(str.isdigit, match[1].rpartition("/")[2])) else stem


def near_duplicates(small: Images) -> list[tuple[int, int]]:
    """Find pairs of images that differ from all others in the same way, as two photographs of one part do.

    What all images share is taken away, so that parts under a fixed camera are not alike; so is their lighting.

    Args:
        small: Gray images (N, side, side).

    Returns:
        Pairs of indices, the lower one first.
    """
    detail = small - small.mean(axis=(1, 2), keepdims=True)
    detail /= detail.std(axis=(1, 2), keepdims=True) + 1e-3
    detail -= np.median(detail[:: len(detail) // 1000 + 1], axis=0)
    for index, image in enumerate(detail):
        detail[index] = image - cv2.GaussianBlur(image, (0, 0), 1.0)
    rows = detail.reshape(len(detail), -1)
    rows -= rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 1e-2 * rows.shape[1] ** 0.5, length, np.inf)  # nothing is like a plain image
    for least in (_ALIKE, _HARDLY_DIFFERENT):
        pairs = _alike(rows, least)
        joined = _Joined(len(rows))
        for one, other in pairs:
            joined.join(one, other)
        largest = max(np.bincount(joined.numbers()))
        if largest <= max(_PER_PART, _LARGEST * len(rows)):
            break
    return pairs


def _alike(rows: Images, least: float) -> list[tuple[int, int]]:
    pairs = []
    for start in range(0, len(rows), _CHUNK):
        likeness = rows[start : start + _CHUNK] @ rows.T
        for one, other in np.argwhere(likeness >= least):
            if start + one < other:
                pairs.append((int(start + one), int(other)))
    return pairs


class _Joined:
    """Sets of numbers that grow together."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        roots = sorted((self._root(one), self._root(other)))
        self._parent[roots[1]] = roots[0]

    def numbers(self) -> tuple[int, ...]:
        roots = [self._root(number) for number in range(len(self._parent))]
        order = {root: number for number, root in enumerate(dict.fromkeys(roots))}
        return tuple(order[root] for root in roots)


def two_kinds(small: Images) -> list[int]:
    """Tell two kinds of images apart, such as two sides of a part, if there are two.

    Args:
        small: Gray images (N, side, side).

    Returns:
        0 or 1 for each image; all 0 where they are of one kind.
    """
    side = small.shape[-1] // 16
    rows = (
        np.stack([cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA).ravel() for image in small])
        if side
        else small
    )
    if len(rows) < 2 / _FEWEST:
        return [0] * len(rows)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 50, 1e-3)
    cv2.setRNGSeed(0)
    _, labels, centers = cv2.kmeans(
        rows.astype(np.float32), 2, np.empty(0, np.int32), criteria, 3, cv2.KMEANS_PP_CENTERS
    )
    labels = labels.ravel()
    along = rows @ (centers[1] - centers[0])
    first, second = along[labels == 0], along[labels == 1]
    if min(len(first), len(second)) < _FEWEST * len(rows):
        return [0] * len(rows)
    spread = np.hypot(first.std(), second.std())
    apart = 2**0.5 * abs(first.mean() - second.mean()) / max(spread, 1e-9)
    if apart < _APART:
        return [0] * len(rows)
    return [int(label != labels[0]) for label in labels]
