# SPDX-License-Identifier: Apache-2.0
"""Replacing parts of anomalib for a while."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from .base import Repair, acts, is_own

_ENGINE_METHODS = ("fit", "validate", "test", "predict", "train")


def replace(module: str, name: str, value: Any) -> Any:
    """Give a module another attribute.

    Args:
        module: Name of a module that is imported.
        name: Name of its attribute.
        value: What takes its place.

    Returns:
        What was there.
    """
    owner = sys.modules[module]
    original = getattr(owner, name)
    setattr(owner, name, value)
    return original


@contextmanager
def replaced(module: str, name: str, value: Any) -> Iterator[None]:
    """Give a module another attribute, for the duration; arguments are those of :func:`replace`."""
    original = replace(module, name, value)
    try:
        yield
    finally:
        replace(module, name, original)


def while_the_engine_runs(repair: Repair, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Have a context in force while anomalib's engine works with a model of this package.

    Args:
        repair: The repair, which may be switched off.
        context: Makes the context.
    """
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    def run(method: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = kwargs.get("model", args[0] if args else None)
        if model is None:  # that of the last run
            model = getattr(getattr(engine, "_trainer", None), "lightning_module", None)
        if not is_own(model) or not acts(repair):
            return method(*args, **kwargs)
        with context():
            return method(*args, **kwargs)

    for name in _ENGINE_METHODS:
        wrap_function_wrapper("anomalib.engine.engine", f"Engine.{name}", run)
