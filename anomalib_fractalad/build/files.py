# SPDX-License-Identifier: Apache-2.0
"""Finding the image files of a folder as people have them."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from anomalib_fractalad.inspection.reading import EXTENSIONS, find_images

_CHUNK = 1 << 20


def image_files(folder: Path, leave_out: Iterable[Path] = ()) -> list[Path]:
    """Find the images of a folder and its sub-folders, as :func:`~anomalib_fractalad.inspection.find_images` does.

    Args:
        folder: The folder.
        leave_out: Folders that are not searched.

    Returns:
        The files, sorted by name.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        msg = f"{folder} {what}; give the folder that holds the images"
        raise ValueError(msg)
    found = sorted(find_images([folder], leave_out))
    if not found:
        msg = f"{folder} holds no image ({', '.join(sorted(EXTENSIONS))}); give the folder that holds the images"
        raise ValueError(msg)
    return found


def same_contents(files: Iterable[Path]) -> list[list[Path]]:
    """Find files with the same bytes; only files of equal size are read.

    Args:
        files: The files.

    Returns:
        Groups of at least two, each in the order of the files.
    """
    by_size = defaultdict(list)
    for file in files:
        by_size[file.stat().st_size].append(file)
    by_digest = defaultdict(list)
    for size, candidates in by_size.items():
        if len(candidates) > 1 and size:
            for file in candidates:
                by_digest[size, _digest(file)].append(file)
    return [group for group in by_digest.values() if len(group) > 1]


def _digest(file: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()


def fingerprint(files: Sequence[Path]) -> str:
    """Digest of the names, sizes and times of change of files."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        stat = file.stat()
        digest.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
