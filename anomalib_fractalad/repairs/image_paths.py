# SPDX-License-Identifier: Apache-2.0
"""Paths with letters outside ASCII are refused as "non-printable"."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .base import Repair, acts, is_own

ENGINE_METHODS = ("fit", "validate", "test", "predict", "train")


@contextmanager
def every_script() -> Iterator[None]:
    """Let anomalib's check of paths pass letters of any script."""
    undo = _replace()
    try:
        yield
    finally:
        undo()


def _replace() -> Callable[[], None]:
    from anomalib_fractalad.image_files import has_control_characters  # noqa: PLC0415

    module: Any = sys.modules["anomalib.data.utils.path"]
    original = module.contains_non_printable_characters
    module.contains_non_printable_characters = has_control_characters

    def undo() -> None:
        module.contains_non_printable_characters = original

    return undo


def _apply(for_all: bool) -> None:
    if for_all:
        _replace()
        return
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    for name in ENGINE_METHODS:
        wrap_function_wrapper("anomalib.engine.engine", f"Engine.{name}", _run)


def _run(method: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wraps what the engine does with a model; only for this package's models it is done otherwise."""
    if not is_own(model_of(engine, args, kwargs)) or not acts(IMAGE_PATHS):
        return method(*args, **kwargs)
    with every_script():
        return method(*args, **kwargs)


def model_of(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model that a method of anomalib's engine is called for: its first argument, or that of the last run.

    Args:
        engine: The engine.
        args: The method's arguments.
        kwargs: Those by name.
    """
    model = kwargs.get("model", args[0] if args else None)
    return getattr(getattr(engine, "_trainer", None), "lightning_module", None) if model is None else model


IMAGE_PATHS = Repair(
    name="image paths",
    defect='Paths with letters outside ASCII are refused as "non-printable".',
    versions=">=2.7,<2.8",
    modules=("anomalib.data.utils.path", "anomalib.engine.engine"),
    apply=_apply,
)
