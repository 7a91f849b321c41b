# SPDX-License-Identifier: Apache-2.0
"""What a repair of anomalib is, and for whom repairs act."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, get_args

from packaging.specifiers import SpecifierSet

from anomalib_fractalad.import_hooks import when_imported

logger = logging.getLogger(__name__)

SWITCH = "ANOMALIB_FRACTALAD_REPAIRS"
PACKAGE = "anomalib_fractalad"
Reach = Literal["own", "all", "none"]

_failures: dict[str, str] = {}
_said: set[str] = set()


@dataclass(frozen=True)
class Repair:
    """One defect of anomalib and what mends it.

    Attributes:
        name: Short name.
        defect: What anomalib does wrong, in a sentence.
        versions: Versions of anomalib that have the defect.
        modules: Modules of anomalib that have to be imported before.
        apply: Mends the defect; its argument tells whether for every model or only for this package's.
    """

    name: str
    defect: str
    versions: str
    modules: tuple[str, ...]
    apply: Callable[[bool], None]


def reach() -> Reach:
    """For whom repairs act: this package's models (``own``), every model (``all``), or nobody (``none``).

    Returns:
        The value of the environment variable ``ANOMALIB_FRACTALAD_REPAIRS``; ``own`` where there is none.
    """
    given = os.environ.get(SWITCH, "own").strip().lower() or "own"
    for known in get_args(Reach):
        if given == known:
            return known  # type: ignore[no-any-return]
    _say_once(f"{SWITCH} is {given!r}; it must be one of {', '.join(get_args(Reach))}. Taken as own.")
    return "own"


def acts(repair: Repair) -> bool:
    """Whether a repair is in force for this package's models: switched on, and made for this anomalib.

    Args:
        repair: The repair. That it is not made for the installed anomalib is logged once.
    """
    if reach() == "none" or repair.name in _failures:
        return False
    if SpecifierSet(repair.versions).contains(version("anomalib"), prereleases=True):
        return True
    _say_once(
        f"the repair {repair.name!r} is for anomalib{repair.versions} and does nothing with {version('anomalib')}: "
        f"{repair.defect}"
    )
    return False


def mend(repair: Repair) -> None:
    """Apply a repair, if it acts; that it cannot be applied is logged, and costs nothing but the repair.

    Args:
        repair: The repair.
    """
    if not acts(repair):
        return
    try:
        repair.apply(reach() == "all")
    except Exception as error:
        _failures[repair.name] = f"{type(error).__name__}: {error}"
        _say_once(f"the repair {repair.name!r} of anomalib could not be applied ({_failures[repair.name]})")


def mend_when_imported(repair: Repair) -> None:
    """Apply a repair as soon as the parts of anomalib that it mends have been imported.

    Args:
        repair: The repair.
    """

    def wait(modules: Sequence[str]) -> None:
        if modules:
            when_imported(modules[0], lambda: wait(modules[1:]))
        else:
            mend(repair)

    wait(repair.modules)


def state(repair: Repair) -> str:
    """For whom a repair is in force, or why it is not."""
    if repair.name in _failures:
        return f"could not be applied ({_failures[repair.name]})"
    if reach() == "none":
        return f"off ({SWITCH}=none)"
    if not acts(repair):
        return f"not needed or not known to fit: anomalib is {version('anomalib')}"
    return "for every model" if reach() == "all" else "for this package's models"


def is_own(model: object) -> bool:
    """Whether a model, or a class of models, is this package's or derived from one of them."""
    kind = model if isinstance(model, type) else type(model)
    return any(base.__module__.partition(".")[0] == PACKAGE for base in kind.__mro__)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)
