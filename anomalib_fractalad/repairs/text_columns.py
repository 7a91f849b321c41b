# SPDX-License-Identifier: Apache-2.0
"""With pandas 3, MVTec LOCO cannot be set up: lists of masks do not go into a column of strings."""

from collections.abc import Callable
from typing import Any

from .base import Repair, acts, is_own
from .image_paths import ENGINE_METHODS, model_of


def _apply(for_all: bool) -> None:
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    if for_all:
        wrap_function_wrapper("anomalib.data.datasets.image.mvtec_loco", "make_dataset", _with_objects)
        return
    for name in ENGINE_METHODS:
        wrap_function_wrapper("anomalib.engine.engine", f"Engine.{name}", _run)


def _with_objects(function: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function while pandas keeps texts as objects, as it did before version 3."""
    import pandas as pd  # noqa: PLC0415

    with pd.option_context("future.infer_string", False):
        return function(*args, **kwargs)


def _run(method: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wraps what the engine does with a model; only for this package's models it is done otherwise."""
    own = is_own(model_of(engine, args, kwargs)) and acts(TEXT_COLUMNS)
    return _with_objects(method, engine, args, kwargs) if own else method(*args, **kwargs)


TEXT_COLUMNS = Repair(
    name="text columns",
    defect="With pandas 3, MVTec LOCO cannot be set up: lists of masks do not go into a column of strings.",
    versions=">=2.7,<2.8",
    modules=("anomalib.data.datasets.image.mvtec_loco", "anomalib.engine.engine"),
    apply=_apply,
)
