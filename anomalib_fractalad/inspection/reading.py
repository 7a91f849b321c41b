# SPDX-License-Identifier: Apache-2.0
"""Finding and reading image files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

EXTENSIONS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_Result = TypeVar("_Result")


class UnreadableImageError(OSError):
    """A file is no image, is broken, or holds values without a known meaning."""


def open_rgb(path: str | Path) -> Image.Image:
    """Open an image in RGB of 8 bits a channel.

    Gray levels of 16 bits are divided by 256, as Pillow does with colors of 16 bits: 65535 becomes 255.

    Args:
        path: The file.

    Raises:
        UnreadableImageError: If the file is no image, is truncated, holds more pixels than Pillow trusts, or has
            gray levels of 32 bits that 0 to 255 do not hold; the message names file, problem and remedy.
    """
    return opened(path, lambda image: in_8_bits(image).convert("RGB"))


def opened(path: str | Path, convert: Callable[[Image.Image], _Result]) -> _Result:
    """Open an image and make something of it; raises as :func:`open_rgb`."""
    try:
        with Image.open(path) as image:
            return convert(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly everything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        msg = f"{path} {_problem(path, error)}"
        raise UnreadableImageError(msg) from error


def _problem(path: str | Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large ({error}). If it can be trusted, raise PIL.Image.MAX_IMAGE_PIXELS."
    if isinstance(error, _UnknownScaleError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        what = "is empty (0 bytes)" if not Path(path).stat().st_size else "is no image of a known format"
    elif "truncated" in str(error).lower():
        what = f"is truncated ({error})"
    else:
        what = f"cannot be decoded ({type(error).__name__}: {error})"
    return f"{what}. Replace the file, or take it out of the folder."


class _UnknownScaleError(ValueError):
    pass


def in_8_bits(image: Image.Image) -> Image.Image:
    """Bring gray levels of more than 8 bits to 8."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # Pillow scales PGM to 16
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        low, high = np.asarray(image).min(), np.asarray(image).max()
        if not 0 <= low <= high <= 255 or (image.mode == "F" and 0 < high <= 1):
            msg = (
                f"has gray levels of 32 bits from {low:g} to {high:g}; black is taken to be 0 and white 255, which "
                "does not fit. Save it with 8 or 16 bits."
            )
            raise _UnknownScaleError(msg)
    return image


def is_complete(path: str | Path, kind: str | None) -> bool:
    """Whether a file ends where a JPEG or PNG, as Pillow calls its kind, ends; other kinds do not tell."""
    end = _ENDS.get(kind or "")
    if end is None:
        return False
    with Path(path).open("rb") as file:
        file.seek(-min(len(end), file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read() == end


def find_images(paths: Iterable[str | Path], leave_out: Iterable[Path] = ()) -> list[Path]:
    """Find images: files as they are, and those of folders and their sub-folders, sorted.

    In folders, hidden files and folders (``.DS_Store``, ``._part.png``) and files without an image's ending
    (``Thumbs.db``) are passed over.

    Args:
        paths: Files and folders.
        leave_out: Folders that are not searched.
    """
    skipped = {folder.resolve() for folder in leave_out}
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if f[0] != "." and (Path(folder) / f).resolve() not in skipped)
                images = (name for name in sorted(names) if name[0] != "." and Path(name).suffix.lower() in EXTENSIONS)
                found.update(dict.fromkeys(Path(folder) / name for name in images))
        else:
            found[path] = None
    return list(found)
