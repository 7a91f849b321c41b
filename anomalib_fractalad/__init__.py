# SPDX-License-Identifier: Apache-2.0
"""FractalAD, ADPS, AAND and FractalMemory as anomalib models."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from anomalib_fractalad.import_hooks import before_import
from anomalib_fractalad.registration import DATA_MODULES, MODELS, register_on_import

if TYPE_CHECKING:
    from anomalib_fractalad.data import SurfaceDefects
    from anomalib_fractalad.models import AAND, ADPS, FractalAD, FractalMemory
    from anomalib_fractalad.post_processing import FalseAlarmThreshold
    from anomalib_fractalad.transforms import FractalAnomalyGenerator

__version__ = "0.2.0"
__all__ = [
    "AAND",
    "ADPS",
    "FalseAlarmThreshold",
    "FractalAD",
    "FractalAnomalyGenerator",
    "FractalMemory",
    "SurfaceDefects",
]

_LAZY = {
    **MODELS,
    **DATA_MODULES,
    "FalseAlarmThreshold": "anomalib_fractalad.post_processing",
    "FractalAnomalyGenerator": "anomalib_fractalad.transforms",
}


def _plan_repairs() -> None:
    try:
        from anomalib_fractalad.repairs import REPAIRS, mend_when_imported  # noqa: PLC0415

        for repair in REPAIRS:
            mend_when_imported(repair)
    except Exception as error:
        message = f"repairs of anomalib are off: {type(error).__name__}: {error}"
        warnings.warn(f"anomalib-fractalad: {message}", RuntimeWarning, stacklevel=2)


# In every process that imports torch; see registration.
register_on_import()
before_import("anomalib", _plan_repairs)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
