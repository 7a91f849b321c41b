# SPDX-License-Identifier: Apache-2.0
"""Checks of numeric arguments."""

import math
from numbers import Integral, Real
from typing import Any


def check_positive(**values: float | None) -> None:
    """Refuse arguments that are given but no finite numbers above zero.

    Args:
        **values: Arguments by name.

    Raises:
        ValueError: If one is zero or less, infinite, not a number, or no number at all.
    """
    for name, value in values.items():
        if value is not None and not (is_finite(value) and value > 0):
            msg = f"{name} is {value!r}; it must be above 0{_and_what(value)}"
            raise ValueError(msg)


def check_not_negative(**values: float | None) -> None:
    """Refuse arguments that are given but no finite numbers from zero on.

    Args:
        **values: Arguments by name.

    Raises:
        ValueError: If one is below zero, infinite, not a number, or no number at all.
    """
    for name, value in values.items():
        if value is not None and not (is_finite(value) and value >= 0):
            msg = f"{name} is {value!r}; it must be 0 or more{_and_what(value)}"
            raise ValueError(msg)


def check_count(**values: int | None) -> None:
    """Refuse arguments that are given but no whole numbers above zero.

    Args:
        **values: Arguments by name.

    Raises:
        ValueError: If one is zero or less, or not an integer; ``2.0`` and ``True`` are none.
    """
    for name, value in values.items():
        if value is not None and not (is_whole(value) and value > 0):
            msg = f"{name} is {value!r}; it must be above 0{'' if is_whole(value) else ' and a whole number'}"
            raise ValueError(msg)


def is_finite(value: Any) -> bool:
    """Whether a value is a finite real number; booleans are none.

    Args:
        value: Anything.
    """
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; booleans are none.

    Args:
        value: Anything.
    """
    return not isinstance(value, bool) and isinstance(value, Integral)


def _and_what(value: Any) -> str:
    return "" if is_finite(value) else " and a finite number"
