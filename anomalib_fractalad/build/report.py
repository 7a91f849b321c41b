# SPDX-License-Identifier: Apache-2.0
"""The report of a build: one file that opens without a network."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("report.html")
_PLACE = "{{content}}"


def write_report(file: Path, content: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> Path:
    """Write the report.

    Args:
        file: Where to.
        content: What was built of what, as plain data.
        images: Scores and small versions of images, see :func:`~.scoring.score_images`.

    Returns:
        The file.
    """
    whole = {
        **content,
        "images": images,
        "date": date.today().isoformat(),
        "version": version("anomalib-fractalad"),
    }
    # Within a script, nothing but a closing tag or a comment is taken for HTML.
    text = json.dumps(whole, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
    new = file.with_suffix(".new")
    new.write_text(TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, text), encoding="utf-8")
    new.replace(file)
    return file
