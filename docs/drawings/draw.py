# SPDX-License-Identifier: Apache-2.0
"""Draw the networks: each text file of this folder becomes a drawing in ``docs/images``.

python docs/drawings/draw.py

A line ``name column row kind text`` puts a box on the grid, and ``|`` in its text starts a new line. Columns and rows
may be fractions. A line ``name -> name`` draws an arrow, with a text behind a colon. What follows ``#`` is a comment.
"""

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
COLUMN, ROW, WIDTH, MARGIN, LINE = 156, 94, 116, 12, 17
COLORS = {  # fill and edge of each kind
    "data": ("#ffffff", "#444444"),
    "step": ("#ececec", "#666666"),
    "frozen": ("#cfe0f3", "#2f5f93"),
    "trained": ("#fbdcb5", "#a5630f"),
    "loss": ("#f4c9c9", "#a32c2c"),
    "fitted": ("#d6ead2", "#3f7a35"),
}
KINDS = {
    "data": "image or map",
    "step": "computed",
    "frozen": "frozen network",
    "trained": "trained network",
    "loss": "loss",
    "fitted": "filled in one pass",
}


HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:g} {1:g}" width="{0:g}" height="{1:g}"
 font-family="Helvetica, Arial, sans-serif" font-size="13">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#333"/></marker></defs>
<rect width="100%" height="100%" fill="#fff"/>"""


class Box(NamedTuple):
    """A box on the grid."""

    column: float
    row: float
    kind: str
    lines: list[str]

    @property
    def center(self) -> tuple[float, float]:
        """Its center in pixels."""
        return MARGIN + WIDTH / 2 + self.column * COLUMN, MARGIN + 30 + self.row * ROW

    @property
    def height(self) -> int:
        """Its height in pixels."""
        return LINE * len(self.lines) + 18

    def svg(self) -> str:
        """The box with its text."""
        (x, y), (fill, edge) = self.center, COLORS[self.kind]
        first = y - LINE * (len(self.lines) - 1) / 2 + 4.5
        texts = [_text(x, first + LINE * i, line) for i, line in enumerate(self.lines)]
        shape = (
            f'<rect x="{x - WIDTH / 2:g}" y="{y - self.height / 2:g}" width="{WIDTH}" height="{self.height}" rx="6" '
            f'fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
        )
        return "\n".join([shape, *texts])


def draw(description: str) -> str:
    """Draw a network.

    Args:
        description: Lines as this module's docstring tells.

    Returns:
        The SVG.

    Raises:
        ValueError: If a line is neither a box nor an arrow between boxes.
    """
    boxes: dict[str, Box] = {}
    arrows: list[str] = []
    for line in filter(None, (line.partition("#")[0].strip() for line in description.splitlines())):
        if arrow := re.fullmatch(r"(\S+) -> (\S+?)(?:: (.+))?", line):
            start, end, text = arrow.groups()
            if start not in boxes or end not in boxes:
                msg = f"no box of that name: {line!r}"
                raise ValueError(msg)
            arrows.append(_arrow(boxes[start], boxes[end], text))
        elif box := re.fullmatch(r"(\S+)\s+([\d.]+)\s+([\d.]+)\s+(\w+)\s+(.+)", line):
            name, column, row, kind, text = box.groups()
            boxes[name] = Box(float(column), float(row), kind, text.split("|"))
        else:
            msg = f"neither a box nor an arrow: {line!r}"
            raise ValueError(msg)
    width = max(box.center[0] for box in boxes.values()) + WIDTH / 2 + MARGIN
    lowest = max(box.center[1] + box.height / 2 for box in boxes.values())
    height = lowest + 2 * MARGIN + LINE
    legend = _legend(lowest + MARGIN, {box.kind for box in boxes.values()})
    parts = [HEAD.format(width, height), *arrows, *(box.svg() for box in boxes.values()), legend]
    return "\n".join([*parts, "</svg>\n"])


def _arrow(start: Box, end: Box, text: str | None) -> str:
    """From side to side, or from above to below where the two lie in one column."""
    (x, y), (to_x, to_y) = start.center, end.center
    if start.column == end.column:
        sign = 1 if to_y > y else -1
        y, to_y = y + sign * start.height / 2, to_y - sign * (end.height / 2 + 2)
        path, middle = f"M{x:g} {y:g}V{to_y:g}", (x + 6, (y + to_y) / 2 + 4)
        anchor = "start"
    else:
        sign = 1 if to_x > x else -1
        x, to_x = x + sign * WIDTH / 2, to_x - sign * (WIDTH / 2 + 2)
        bend = (x + to_x) / 2
        curve = f"M{x:g} {y:g}C{bend:g} {y:g} {bend:g} {to_y:g} {to_x:g} {to_y:g}"
        path = f"M{x:g} {y:g}H{to_x:g}" if y == to_y else curve
        middle, anchor = (bend, (y + to_y) / 2 - 6), "middle"
    line = f'<path d="{path}" fill="none" stroke="#333" stroke-width="1.5" marker-end="url(#tip)"/>'
    return line if text is None else f"{line}\n{_text(*middle, text, anchor)}"


def _legend(y: float, used: set[str]) -> str:
    lines = []
    for place, (kind, meaning) in enumerate((kind, meaning) for kind, meaning in KINDS.items() if kind in used):
        x, (fill, edge) = MARGIN + 148 * place, COLORS[kind]
        lines.append(f'<rect x="{x}" y="{y:g}" width="20" height="14" rx="3" fill="{fill}" stroke="{edge}"/>')
        lines.append(_text(x + 27, y + 11.5, meaning, "start"))
    return "\n".join(lines)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#111">{escape(text)}</text>'


if __name__ == "__main__":
    for source in sorted(FOLDER.glob("*.txt")):
        drawing = FOLDER.parent / "images" / f"{source.stem}_architecture.svg"
        drawing.write_text(draw(source.read_text(encoding="utf-8")), encoding="utf-8")
