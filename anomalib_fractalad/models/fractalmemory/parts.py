# SPDX-License-Identifier: Apache-2.0
"""Which part an image shows, by the name of its file."""

import hashlib
import re
from pathlib import Path


def check_pattern(pattern: str | None) -> None:
    """Refuse what is no regular expression.

    Args:
        pattern: What finds the part in the name of a file.

    Raises:
        ValueError: If it is no regular expression.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        msg = f"part_pattern is {pattern!r}, which is no regular expression: {error}"
        raise ValueError(msg) from error


def part_number(path: str, pattern: str | None) -> int:
    """Number the part that an image shows.

    Args:
        path: The image's file.
        pattern: What finds the part in the file's name; left out, each file is a part.

    Returns:
        63 bits, the same in every process.

    Raises:
        ValueError: If the pattern finds nothing.
    """
    return int.from_bytes(hashlib.blake2b(_part(path, pattern).encode(), digest_size=8).digest(), "big") >> 1


def _part(path: str, pattern: str | None) -> str:
    if pattern is None:
        return path
    match = re.search(pattern, Path(path).name)
    if match is None:
        msg = f"part_pattern {pattern!r} finds nothing in the name of {path}; leave it out where images are not grouped"
        raise ValueError(msg)
    return " ".join(map(str, match.groups())) if match.groups() else match[0]
