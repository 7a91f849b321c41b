# SPDX-License-Identifier: Apache-2.0
"""Drawings are those of their text sources, and links between documents lead somewhere.

Links within the site are checked by Sphinx; these are the ones on GitHub.
"""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRAWINGS = ROOT / "docs" / "drawings"
SOURCES = sorted(DRAWINGS.glob("*.txt"))
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/*/*.md"),
    *ROOT.glob("anomalib_fractalad/**/*.md"),
]
draw = runpy.run_path(str(DRAWINGS / "draw.py"))["draw"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_drawings_are_those_of_their_sources(source: Path) -> None:
    drawing = ROOT / "docs" / "images" / f"{source.stem}_architecture.svg"
    assert drawing.read_text(encoding="utf-8") == draw(source.read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", ["image 0", "image 0 0 data text\nimage -> head"])
def test_mistakes_in_a_drawing_are_named(line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line.splitlines()[-1])):
        draw(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", _without_code(page))
    for link in links:
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Names of headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
