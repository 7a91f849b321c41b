# SPDX-License-Identifier: Apache-2.0
"""Dealing out good images by part: to train on, to choose by, and to calibrate the threshold with."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib.data import Tabular

from anomalib_fractalad.post_processing.false_alarms import images_needed

from .look import Look

DEFAULT_RATE = 0.01
FEWEST = 20  # good images
_CALIBRATION_SHARE, _MOST_CALIBRATION = 0.2, 500
_HELD_SHARE, _LEAST_HELD, _MOST_HELD = 0.25, 4, 24
_LEAST_TRAINING = 0.25  # share of the images


@dataclass(frozen=True)
class Split:
    """Good images, dealt out so that all images of a part are in the same place.

    Attributes:
        train: To train on while candidates are compared.
        held: Neither trained on nor calibrated with while candidates are compared; the chosen one trains on them, too.
        calibration: To calibrate the threshold with; nothing is trained or chosen on them.
        false_alarms: Share of good images that may raise an alarm.
        warnings: What a person should know.
    """

    train: tuple[Path, ...]
    held: tuple[Path, ...]
    calibration: tuple[Path, ...]
    false_alarms: float
    warnings: tuple[str, ...] = ()


def split(found: Look, false_alarms: float | None = None, seed: int = 0) -> Split:
    """Deal out good images by part.

    A fifth of the images, or as many as the rate of false alarms takes, calibrate; at most half of all.

    Args:
        found: The images.
        false_alarms: Share of good images that may raise an alarm. Left out, it is 0.01, or the smallest share that a
            third of the images can promise.
        seed: Seed of who goes where.

    Raises:
        ValueError: If there are too few images or parts; the message says how many would do.
    """
    count = len(found.files)
    if count < FEWEST:
        msg = (
            f"{count} good images are too few; take at least {FEWEST}, "
            f"and {2 * images_needed(DEFAULT_RATE)} to promise {DEFAULT_RATE:.0%} false alarms"
        )
        raise ValueError(msg)
    rate, warnings = _rate(count, false_alarms)
    wanted = max(images_needed(rate), min(int(_CALIBRATION_SHARE * count), _MOST_CALIBRATION))
    held_wanted = max(_LEAST_HELD, min(int(_HELD_SHARE * (count - wanted)), _MOST_HELD))
    calibration: list[Path] = []
    held: list[Path] = []
    train: list[Path] = []
    least_parts = images_needed(rate) if images_needed(rate) <= found.parts // 2 else 0
    parts = 0
    for part in _shuffled_parts(found, seed):
        calibrates = len(calibration) < wanted or parts < least_parts
        parts += calibrates
        place = calibration if calibrates else held if len(held) < held_wanted else train
        place.extend(part)
    if len(train) < _LEAST_TRAINING * count:
        msg = (
            f"{found.folder} shows {found.parts} parts ({found.grouping.how}), too few to train on some and calibrate "
            f"with others: {len(train)} of {count} images would be left to train on. Take images of more parts, or say "
            "with --group which images belong together"
        )
        raise ValueError(msg)
    if parts < images_needed(rate):
        warnings.append(
            f"The {len(calibration)} calibration images show {parts} parts, and images of one part are alike: "
            f"that at most {rate:.2%} of good images raise an alarm is sure of {images_needed(rate)} parts alone."
        )
    train_files, held_files, calibration_files = (tuple(sorted(files)) for files in (train, held, calibration))
    return Split(train_files, held_files, calibration_files, rate, tuple(warnings))


def _rate(count: int, asked: float | None) -> tuple[float, list[str]]:
    if asked is not None and not 0 < asked < 1:
        msg = f"--false-alarms is {asked:g}; give a share above 0 and below 1, such as 0.01"
        raise ValueError(msg)
    rate = DEFAULT_RATE if asked is None else asked
    if images_needed(rate) <= count // 2:
        return rate, []
    enough = 2 * images_needed(rate)
    if asked is not None:
        smallest = math.ceil(1000 / (count // 2 + 1)) / 1000
        msg = (
            f"{count} good images, half of them to calibrate with, can promise a false-alarm rate of {smallest:g} at "
            f"best: give --false-alarms {smallest:g}, or take {enough} images for {asked:g}"
        )
        raise ValueError(msg)
    rate = math.ceil(1000 / (count // 3 + 1)) / 1000
    warning = (
        f"{count} good images are too few to promise {DEFAULT_RATE:.0%} false alarms, which takes {enough}. "
        f"The threshold promises at most {rate:.1%}."
    )
    return rate, [warning]


def _shuffled_parts(found: Look, seed: int) -> list[list[Path]]:
    """The files of each part in random order, but so that two kinds of view come in turn."""
    parts: dict[int, list[int]] = defaultdict(list)
    for index, part in enumerate(found.grouping.part_of):
        parts[part].append(index)
    shuffled = list(parts.values())
    random.Random(seed).shuffle(shuffled)  # noqa: S311  not for secrets
    by_side = [[part for part in shuffled if found.side[part[0]] == side] for side in (0, 1)]
    placed = [((place + 0.5) / len(side), part) for side in by_side for place, part in enumerate(side)]
    return [[found.files[index] for index in part] for _, part in sorted(placed, key=lambda entry: entry[0])]


def data_module(*images: Sequence[Path], **options: Any) -> Tabular:
    """Make anomalib's data module of lists of images; see :func:`table`, whose arguments it takes."""
    return Tabular(**table(*images, **options))


def table(
    train: Sequence[Path],
    good: Sequence[Path] = (),
    bad: Sequence[Path] = (),
    *,
    masks: Sequence[Path] = (),
    name: str = "part",
    batch_size: int = 8,
    workers: int = 0,
) -> dict[str, Any]:
    """Arguments of anomalib's Tabular, as plain data, of lists of images.

    Args:
        train: Good images to train on.
        good: Good images to validate and test on.
        bad: Bad images to validate and test on.
        masks: A mask for each bad image, or none.
        name: Name of the data.
        batch_size: Images in a batch.
        workers: Processes that read images.
    """
    files = [*train, *good, *bad]
    samples: dict[str, list[Any]] = {
        "image_path": [str(file.resolve()) for file in files],
        "label_index": [0] * (len(train) + len(good)) + [1] * len(bad),
        "split": ["train"] * len(train) + ["test"] * (len(good) + len(bad)),
    }
    if masks:
        samples["mask_path"] = [""] * (len(train) + len(good)) + [str(mask.resolve()) for mask in masks]
    return {
        "name": name,
        "samples": samples,
        "train_batch_size": batch_size,
        "eval_batch_size": batch_size,
        "num_workers": workers,
        "val_split_mode": "same_as_test",
        # Where there are no good images to test on, anomalib would take a fifth of those to train on, at random.
        "test_split_mode": "from_dir" if good else "none",
    }
