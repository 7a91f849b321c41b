# SPDX-License-Identifier: Apache-2.0
"""The inspection as one file that needs nothing of this package."""

import ast
import sys
from collections.abc import Iterator

from anomalib_fractalad.inspection import command, inspector, reading

_HEADER = '''\
# SPDX-License-Identifier: Apache-2.0
"""Inspect images with the part folder that this file lies in: ``python inspect.py IMAGES`` (``--help`` tells more).

It needs ``openvino``, ``numpy`` and ``pillow``. It was made of ``anomalib_fractalad.inspection``.
"""

from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
# Beside a script, Python looks for its own module of this name, too.
sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != _HERE]
if __name__ == "inspect":
    del sys.modules["inspect"]
    import inspect

{own}

try:
{others}
except ImportError:
    if __name__ != "inspect":  # that Python looked for is there already
        raise
'''

_FOOTER = """

if __name__ == "__main__":
    sys.exit(inspect_main(part=_HERE, prog="inspect.py"))
"""


def standalone() -> str:
    """Join the modules of :mod:`anomalib_fractalad.inspection`.

    Returns:
        The text of a Python file.
    """
    imports: dict[str, None] = {}
    body: list[str] = []
    for module in (reading, inspector, command):
        text = _source(module)
        lines, end = text.splitlines(), 0
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.update(dict.fromkeys(_kept(node)))
            elif not _is_dropped(node):
                body += lines[end : node.end_lineno]
            end = node.end_lineno or end
    own = sorted(line for line in imports if line.split()[1].partition(".")[0] in sys.stdlib_module_names)
    others = sorted(f"    {line}" for line in imports if line not in own)
    header = _HEADER.format(own="\n".join(own), others="\n".join(others))
    return header + "\n".join(body) + "\n" + _FOOTER


def _source(module: object) -> str:
    loader = module.__spec__.loader  # type: ignore[attr-defined]
    return str(loader.get_source(module.__name__))  # type: ignore[attr-defined]


def _kept(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """A line for each import but those of the package and of the future."""
    if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
        return
    for name in node.names:
        alias = ast.Import([name]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [name], 0)
        yield ast.unparse(alias)


def _is_dropped(node: ast.stmt) -> bool:
    """Docstrings of modules, and imports for type checkers: in the file, annotations are text."""
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_text or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
