# SPDX-License-Identifier: Apache-2.0
"""Which code a result comes from: digests of source, and versions of packages."""

import ast
import hashlib
import inspect
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

PACKAGE = Path(__file__).parents[1]
# What reads results, or starts and watches jobs, changes none.
NO_RESULT = (
    "benchmark/__main__.py",
    "benchmark/plots.py",
    "benchmark/record.py",
    "benchmark/report.py",
    "benchmark/runner.py",
    "configs/__init__.py",  # beside the package in a clone, within it once installed
)
PACKAGES = ("anomalib", "kornia", "lightning", "numpy", "pillow", "timm", "torch", "torchmetrics", "torchvision")
RUNTIME_PACKAGES = MappingProxyType({"torch": ("torch",), "openvino_int8": ("openvino", "onnxscript", "nncf")})


def package_digest(package: Path = PACKAGE) -> str:
    """Digest of the package's own code, comments, docstrings and layout aside.

    Args:
        package: Folder of the package.
    """
    files = [file for file in package.rglob("*.py") if file.relative_to(package).as_posix() not in NO_RESULT]
    return _digest(sorted(files), package)


def source_digest(*classes: type) -> str | None:
    """Digest of the files of classes that are neither anomalib's nor the package's.

    Args:
        *classes: The classes.

    Returns:
        The digest; ``None`` without such classes.
    """
    others = [kind for kind in classes if kind.__module__.partition(".")[0] not in {"anomalib", "anomalib_fractalad"}]
    files = sorted({Path(file) for file in map(inspect.getsourcefile, others) if file is not None})
    return _digest(files, None) if files else None


def _digest(files: Iterable[Path], root: Path | None) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix() if root else file.name}\n".encode())
        total.update(_code(file, file.stat().st_mtime_ns).encode())
    return total.hexdigest()[:16]


@cache
def _code(file: Path, _time: int) -> str:
    """A file's code alone: what is written about it changes no result."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body: list[Any] = getattr(node, "body", []) if isinstance(node, _DOCUMENTED) else []
        if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
            body[:1] = [] if len(body) > 1 else [ast.Pass()]
    return ast.unparse(tree)


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a trained model and its quality depend on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def runtime_versions(runtime: str) -> str:
    """Names and versions of the packages that a runtime is measured with.

    Args:
        runtime: A member of :data:`anomalib_fractalad.benchmark.config.RUNTIMES`.
    """
    packages = RUNTIME_PACKAGES.get(runtime, ("openvino", "onnxscript"))
    return ", ".join(f"{package} {version(package)}" for package in packages)
