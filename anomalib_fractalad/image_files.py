# SPDX-License-Identifier: Apache-2.0
"""Reading images that are not like the others.

:func:`read_image` and :func:`read_mask` take the place of anomalib's functions of the same names
(:mod:`anomalib_fractalad.repairs`). They differ in what anomalib 2.7 gets wrong: gray images of more than 8 bits
come out white there, and the errors for broken files do not name the file.
"""

import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_dtype, to_image
from torchvision.tv_tensors import Mask

from anomalib_fractalad.inspection.reading import (
    UnreadableImageError,
    in_8_bits as _in_8_bits,
    is_complete,
    open_rgb,
    opened as _open,
)

__all__ = [
    "Overview",
    "UnreadableImageError",
    "check_image",
    "has_control_characters",
    "is_blank",
    "open_rgb",
    "overview",
    "read_image",
    "read_mask",
]


def read_image(path: str | Path, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """Read an image in RGB.

    Args:
        path: The file.
        as_tensor: Give a tensor instead of an array.

    Returns:
        float32 tensor of shape (3, height, width) or float64 array of shape (height, width, 3), in [0, 1].

    Raises:
        UnreadableImageError: As for :func:`open_rgb`.
    """
    image = open_rgb(path)
    if as_tensor:
        return to_dtype(to_image(image), torch.float32, scale=True)  # type: ignore[no-any-return]
    return np.array(image) / 255.0


def read_mask(path: str | Path, as_tensor: bool = False) -> torch.Tensor | np.ndarray:
    """Read a mask of defects.

    Args:
        path: The file. Every gray level above 0 is a defect, so that masks of 0 and 1 are also taken.
        as_tensor: Give a tensor instead of an array.

    Returns:
        uint8 tensor of zeros and ones, or uint8 array of the gray levels; shape (height, width).

    Raises:
        UnreadableImageError: If the file cannot be read.
    """
    image = _open(path, lambda image: image.convert("L"))
    return Mask(to_image(image).squeeze(0) > 0, dtype=torch.uint8) if as_tensor else np.array(image)


def check_image(path: str | Path, *, decode: bool = True) -> None:
    """Make sure that an image can be read, with as little memory as its format allows.

    Args:
        path: The file.
        decode: Decode all of it. Otherwise only its header is read, and whether the file ends where a JPEG or PNG ends.

    Raises:
        UnreadableImageError: As for :func:`open_rgb`.
    """
    _open(path, lambda image: _decode(image, path, whole=decode))


class Overview(NamedTuple):
    """What an image is like, as far as a small version of it tells.

    Attributes:
        size: Width and height in pixels.
        mode: Pillow's name of the pixel format.
        orientation: EXIF's orientation, 1 where the image is upright.
        small: uint8 array (side, side, 3), the whole image at another proportion.
    """

    size: tuple[int, int]
    mode: str
    orientation: int
    small: npt.NDArray[np.uint8]


def overview(path: str | Path, side: int = 64) -> Overview:
    """Look at an image without keeping it; a JPEG is decoded at a fraction of its size.

    Args:
        path: The file.
        side: Side in pixels of the small version.

    Raises:
        UnreadableImageError: As for :func:`open_rgb`.
    """
    return _open(path, lambda image: _overview(image, side))


def _overview(image: Image.Image, side: int) -> Overview:
    size, mode, orientation = image.size, image.mode, image.getexif().get(_ORIENTATION, 1)
    image.draft("RGB", (2 * side, 2 * side))
    small = _in_8_bits(image).convert("RGB").resize((side, side), Image.Resampling.BOX)
    return Overview(size, mode, int(orientation), np.asarray(small))


_ORIENTATION = 0x0112


def is_blank(path: str | Path) -> bool:
    """Whether a mask marks nothing.

    Args:
        path: The file, as for :func:`read_mask`.

    Raises:
        UnreadableImageError: If the file cannot be read.
    """
    return _open(path, lambda image: image.convert("L").getbbox()) is None


def _decode(image: Image.Image, path: str | Path, *, whole: bool) -> None:
    if image.mode in {"I", "F"}:  # whether they can be read depends on the values
        _in_8_bits(image)
    elif whole or not is_complete(path, image.format):
        image.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its size
        image.load()


def has_control_characters(path: str | Path) -> bool:
    """Whether a path has characters that cannot be shown; letters of every script and all spaces can."""
    return any(unicodedata.category(character) in {"Cc", "Cs"} for character in str(path))
