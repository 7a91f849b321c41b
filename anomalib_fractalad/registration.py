# SPDX-License-Identifier: Apache-2.0
"""Registration of the package's models and data modules with anomalib.

anomalib finds a model by looking at what has been imported. Every process that uses anomalib imports torch, and torch
calls :func:`register_on_import` at the end of its own import (entry-point group ``torch.backends``). From then on, an
import of anomalib also brings in this package's models, so that ``--model FractalAD``, ``get_model("FractalAD")`` and
``from anomalib.models import FractalAD`` need nothing else.
"""

import importlib
import sys
import warnings
from collections.abc import Callable

from .import_hooks import before_import, unfinished, when_imported

DATA_MODULES = {"SurfaceDefects": "anomalib_fractalad.data.surface_defects"}
MODELS = {
    "AAND": "anomalib_fractalad.models.aand",
    "ADPS": "anomalib_fractalad.models.adps",
    "FractalAD": "anomalib_fractalad.models.fractalad",
    "FractalMemory": "anomalib_fractalad.models.fractalmemory",
}


_registered = False


def register_on_import() -> None:
    """Arrange for models and data modules to be registered as soon as anomalib is imported.

    Imports nothing heavy and never raises: a failure becomes one warning.
    """
    global _registered  # noqa: PLW0603
    if not _registered:
        _registered = True
        before_import("anomalib", _harmless(_register))


def _register() -> None:
    # torch may be imported from the middle of anomalib.data or anomalib.models. So models and data modules wait for a
    # part that is always imported after torch and that holds all that the package's own modules need.
    when_imported("anomalib.data.datamodules", _harmless(lambda: _publish(DATA_MODULES, "anomalib.data")))
    when_imported("anomalib.models.image", _harmless(lambda: _publish(MODELS, "anomalib.models")))
    when_imported("anomalib.models", _harmless(_allow_own_class_paths))


def _publish(names: dict[str, str], package: str) -> None:
    # A module of this package may be what imports anomalib, and what the models need before it has all its names.
    if (module := unfinished("anomalib_fractalad")) is not None:
        when_imported(module, _harmless(lambda: _publish(names, package)))
        return
    for name, module in names.items():
        setattr(sys.modules[package], name, getattr(importlib.import_module(module), name))


def _allow_own_class_paths() -> None:
    """Let ``get_model`` take ``anomalib_fractalad.NAME``: its list of trusted packages knows only anomalib's."""
    sys.modules["anomalib.models"].ALLOWED_MODULES.add("anomalib_fractalad")


def _harmless(hook: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            hook()
        except Exception as error:
            _warn(error)

    return run


def _warn(error: Exception) -> None:
    warnings.warn(
        f"anomalib-fractalad could not register its models with anomalib ({type(error).__name__}: {error}). "
        "anomalib itself works on without them. Install an anomalib that anomalib-fractalad supports: "
        "pip install 'anomalib>=2.7,<2.8'.",
        RuntimeWarning,
        stacklevel=2,
    )
