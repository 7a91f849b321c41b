# SPDX-License-Identifier: Apache-2.0
"""With pandas 3, MVTec LOCO cannot be set up: lists of masks do not go into a column of strings."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .base import Repair
from .replacing import while_the_engine_runs


def _texts_as_objects() -> AbstractContextManager[None]:
    """Have pandas keep texts as objects, as it did before version 3, for the duration."""
    import pandas as pd  # noqa: PLC0415

    context: AbstractContextManager[None] = pd.option_context("future.infer_string", False)
    return context


def _make_dataset(make_dataset: Callable[..., Any], _: None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _texts_as_objects():
        return make_dataset(*args, **kwargs)


def _apply(for_all: bool) -> None:
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    if for_all:
        wrap_function_wrapper("anomalib.data.datasets.image.mvtec_loco", "make_dataset", _make_dataset)
    else:
        while_the_engine_runs(TEXT_COLUMNS, _texts_as_objects)


TEXT_COLUMNS = Repair(
    name="text columns",
    defect="With pandas 3, MVTec LOCO cannot be set up: lists of masks do not go into a column of strings.",
    versions=">=2.7,<2.8",
    modules=("anomalib.data.datasets.image.mvtec_loco", "anomalib.engine.engine"),
    apply=_apply,
)
