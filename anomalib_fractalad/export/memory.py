# SPDX-License-Identifier: Apache-2.0
"""What an export leaves behind: memory that torch keeps, and messages of other packages."""

import gc
import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHATTY = ("nncf", "onnx_ir", "onnxscript", "torch.onnx")


@contextmanager
def leave_nothing_behind() -> Iterator[None]:
    """Have torch forget an export when it is over.

    It would keep what it knows of the symbolic shapes, by caches of functions and in a cycle of references that the
    garbage collector cannot see, and the text of the code that it generated: about 5 MB an export. Where another torch
    keeps them elsewhere, they stay.
    """
    known_shapes, code = symbolic_shapes(), generated_code()
    known_code = set(code)
    try:
        yield
    finally:
        for shapes in symbolic_shapes():
            if not any(shapes is known for known in known_shapes):
                shapes.tracked_fakes = None
        for method in vars(_private("torch.fx.experimental.symbolic_shapes", "ShapeEnv")).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
        for name in set(code) - known_code:
            del code[name]


def symbolic_shapes() -> list[Any]:
    """All that torch knows of symbolic shapes at present."""
    kind = _private("torch.fx.experimental.symbolic_shapes", "ShapeEnv")
    return [thing for thing in gc.get_objects() if type(thing) is kind]


def generated_code() -> dict[str, Any]:
    """The text of the code that torch has generated, by name."""
    cache = getattr(_private("torch.fx.graph_module", "_loader"), "eval_cache", None)
    return cache if isinstance(cache, dict) else {}


def _private(module: str, name: str) -> Any:
    """Something of torch that another release may not have; then a class that nothing is an instance of."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return type("Missing", (), {})


@contextmanager
def quiet() -> Iterator[None]:
    """Let the packages that do an export say warnings and errors alone; anomalib's program shows all they note."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.level, logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
