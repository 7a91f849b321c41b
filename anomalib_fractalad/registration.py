# SPDX-License-Identifier: Apache-2.0
"""Registration of the package's models and data modules with anomalib.

anomalib finds a model by looking at what has been imported. Every process that uses anomalib imports torch, and torch
calls :func:`register_on_import` at the end of its own import (entry-point group ``torch.backends``). From then on, an
import of anomalib also brings in this package's models, so that ``--model FractalAD``, ``get_model("FractalAD")`` and
``from anomalib.models import FractalAD`` need nothing else. In the same way, repairs of anomalib
(:mod:`anomalib_fractalad.repairs`) wait for the parts of anomalib that they mend.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

DATA_MODULES = {"SurfaceDefects": "anomalib_fractalad.data.surface_defects"}
MODELS = {
    "AAND": "anomalib_fractalad.models.aand",
    "ADPS": "anomalib_fractalad.models.adps",
    "FractalAD": "anomalib_fractalad.models.fractalad",
    "FractalMemory": "anomalib_fractalad.models.fractalmemory",
}


def register_on_import() -> None:
    """Arrange for models and data modules to be registered as soon as anomalib is imported.

    Imports nothing heavy and never raises: a failure becomes one warning.
    """
    if any(name.partition(".")[0] == "anomalib" for name in sys.modules):
        _register_hooks()
    elif not any(isinstance(finder, _AnomalibWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AnomalibWatcher())


class _AnomalibWatcher:
    """Puts off the import of wrapt, which takes longer than all the rest, to the first import of anomalib."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        del path, target
        if fullname.partition(".")[0] != "anomalib":
            return None
        sys.meta_path.remove(self)
        _register_hooks()
        return find_spec(fullname)


_registered = False


def _register_hooks() -> None:
    global _registered  # noqa: PLW0603
    if _registered:
        return
    _registered = True
    try:
        # torch may be imported from the middle of anomalib.data or anomalib.models. So models and data modules wait
        # for a part that is always imported after torch and that holds all that the package's own modules need.
        _when_imported("anomalib.data.datamodules", _harmless(lambda: _publish(DATA_MODULES, "anomalib.data")))
        _when_imported("anomalib.models.image", _harmless(lambda: _publish(MODELS, "anomalib.models")))
        _when_imported("anomalib.models", _harmless(_allow_own_class_paths))
    except Exception as error:
        _warn(error)
    try:
        _plan_repairs()
    except Exception as error:
        message = f"repairs of anomalib are off: {type(error).__name__}: {error}"
        warnings.warn(f"anomalib-fractalad: {message}", RuntimeWarning, stacklevel=2)


def _publish(names: dict[str, str], package: str) -> None:
    for name, module in names.items():
        setattr(sys.modules[package], name, getattr(importlib.import_module(module), name))


def _allow_own_class_paths() -> None:
    """Let ``get_model`` take ``anomalib_fractalad.NAME``: its list of trusted packages knows only anomalib's."""
    sys.modules["anomalib.models"].ALLOWED_MODULES.add("anomalib_fractalad")


def _plan_repairs() -> None:
    from anomalib_fractalad.repairs import REPAIRS, Repair, mend  # noqa: PLC0415

    def plan(repair: Repair, modules: Sequence[str]) -> None:
        if modules:
            _when_imported(modules[0], lambda: plan(repair, modules[1:]))
        else:
            mend(repair)

    for repair in REPAIRS:
        plan(repair, repair.modules)


def _when_imported(name: str, hook: Callable[[], None]) -> None:
    """Call a hook when a module has been imported as a whole."""
    from wrapt import register_post_import_hook  # noqa: PLC0415

    parent, _, child = name.rpartition(".")
    if name not in sys.modules:
        register_post_import_hook(lambda _module: hook(), name)
    elif child in vars(sys.modules[parent]):
        hook()
    else:  # in the middle of its import, at whose end it is bound in its parent
        _AwaitsChild.expect(sys.modules[parent], child, hook)


def _harmless(hook: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            hook()
        except Exception as error:
            _warn(error)

    return run


class _AwaitsChild(ModuleType):
    """A package that calls hooks when a module below it is bound, as Python does after the import."""

    hooks: dict[tuple[str, str], list[Callable[[], None]]] = {}  # noqa: RUF012

    @classmethod
    def expect(cls, package: ModuleType, child: str, hook: Callable[[], None]) -> None:
        cls.hooks.setdefault((package.__name__, child), []).append(hook)
        package.__class__ = cls

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        for hook in self.hooks.pop((self.__name__, name), []):
            hook()


def _warn(error: Exception) -> None:
    warnings.warn(
        f"anomalib-fractalad could not register its models with anomalib ({type(error).__name__}: {error}). "
        "anomalib itself works on without them. Install an anomalib that anomalib-fractalad supports: "
        "pip install 'anomalib>=2.7,<2.8'.",
        RuntimeWarning,
        stacklevel=2,
    )
