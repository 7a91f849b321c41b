# SPDX-License-Identifier: Apache-2.0
"""Inferencers read gray images of more than 8 bits as white, so that they score otherwise than the trained model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .base import PACKAGE, Repair, acts, is_own
from .image_reading import repaired_reading

_MARK = "_anomalib_fractalad_model"


def _apply(for_all: bool) -> None:
    if for_all:
        return  # the repair of image reading reaches the inferencers, too
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    for name in ("TorchInferencer", "OpenVINOInferencer"):
        module = f"anomalib.deploy.inferencers.{name.replace('Inferencer', '').lower()}_inferencer"
        wrap_function_wrapper(module, f"{name}.load_model", _load_model)
        wrap_function_wrapper(module, f"{name}.predict", _predict)


def _load_model(load_model: Callable[..., Any], inferencer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    model = load_model(*args, **kwargs)
    path = kwargs.get("path", args[0] if args else None)
    setattr(inferencer, _MARK, is_own(model) or _is_marked(path))
    return model


def _is_marked(path: Any) -> bool:
    """Whether an OpenVINO file says that this package wrote it."""
    if not isinstance(path, str | Path) or Path(path).suffix != ".xml" or not Path(path).is_file():
        return False
    return f"<{PACKAGE}" in Path(path).read_text(errors="replace")


def _predict(predict: Callable[..., Any], inferencer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not getattr(inferencer, _MARK, False) or not acts(INFERENCERS):
        return predict(*args, **kwargs)
    with repaired_reading(type(inferencer)):
        return predict(*args, **kwargs)


INFERENCERS = Repair(
    name="inferencers",
    defect="Inferencers read gray images of more than 8 bits as white, and score otherwise than the trained model.",
    versions=">=2.7,<2.8",
    modules=("anomalib.deploy.inferencers.torch_inferencer", "anomalib.deploy.inferencers.openvino_inferencer"),
    apply=_apply,
)
