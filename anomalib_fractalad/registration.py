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
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

DATA_MODULES = {"SurfaceDefects": "anomalib_fractalad.data.surface_defects"}
MODELS = {
    "AAND": "anomalib_fractalad.models.aand",
    "ADPS": "anomalib_fractalad.models.adps",
    "FractalAD": "anomalib_fractalad.models.fractalad",
}


def register_on_import() -> None:
    """Arrange for models and data modules to be registered as soon as anomalib is imported.

    Imports nothing heavy and never raises: a failure becomes one warning.
    """
    if any(target in sys.modules for target in _HOOKS):
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
        from wrapt import register_post_import_hook  # noqa: PLC0415

        for module, hook in _HOOKS.items():
            register_post_import_hook(_harmless(hook), module)
    except Exception as error:
        _warn(error)


def _harmless(hook: Callable[[], None]) -> Callable[[ModuleType], None]:
    def run(_module: ModuleType) -> None:
        try:
            hook()
        except Exception as error:
            _warn(error)

    return run


def _warn(error: Exception) -> None:
    warnings.warn(
        f"anomalib-fractalad could not register its models with anomalib ({type(error).__name__}: {error}). "
        "anomalib itself works on without them. Install an anomalib that anomalib-fractalad supports: "
        "pip install 'anomalib>=2.7,<3'.",
        RuntimeWarning,
        stacklevel=2,
    )


def _publish(names: dict[str, str], package: str) -> None:
    for name, module in names.items():
        setattr(sys.modules[package], name, getattr(importlib.import_module(module), name))


def _publish_data_modules() -> None:
    _publish(DATA_MODULES, "anomalib.data")


def _publish_models() -> None:
    _publish(MODELS, "anomalib.models")


def _allow_own_class_paths() -> None:
    """Let ``get_model`` take ``anomalib_fractalad.NAME``: its list of trusted packages knows only anomalib's."""
    sys.modules["anomalib.models"].ALLOWED_MODULES.add("anomalib_fractalad")


def _seed_command_line() -> None:
    """Let ``--seed_everything`` of anomalib's program work for this package's models.

    The program of anomalib 2.7 takes the option and then does nothing with it. As in Lightning's own program, the seed
    is set before the model is built, and logged; left out, it is ``PL_GLOBAL_SEED`` of the environment, or 0.
    """
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    wrap_function_wrapper("anomalib.utils.config", "update_config", _seed_and_update_config)


def _seed_and_update_config(
    update_config: Callable[..., Any], _: None, args: tuple[Any], kwargs: dict[str, Any]
) -> Any:
    """Wraps what anomalib's program calls between reading the configuration and building the model."""
    config = update_config(*args, **kwargs)
    model, seed = config.get("model"), config.get("seed_everything", False)
    name = getattr(model, "class_path", "").rpartition(".")[2]
    if name in MODELS and seed is not False:
        from lightning.pytorch import seed_everything  # noqa: PLC0415

        config["seed_everything"] = seed_everything(None if seed is True else seed, workers=True)
    return config


def _join_benchmark_results() -> None:
    """Let one run of anomalib's benchmark hold models with different arguments or metrics; 2.7 fails to join these."""
    from pandas import DataFrame  # noqa: PLC0415

    sys.modules["anomalib.pipelines.benchmark.job"].BenchmarkJob.collect = staticmethod(DataFrame)


def _read_every_picture() -> None:
    """Let anomalib read grey pictures of more than 8 bits, and name the file that it cannot read."""
    from anomalib_fractalad.image_files import read_image, read_mask  # noqa: PLC0415

    module = sys.modules["anomalib.data.utils.image"]
    for replacement in (read_image, read_mask):
        name = replacement.__name__
        original = getattr(module, name)
        # Where torch does not load this package, others may have imported the function already.
        for user in [user for key, user in list(sys.modules.items()) if key.startswith("anomalib.")]:
            if getattr(user, "__dict__", {}).get(name) is original:
                setattr(user, name, replacement)


def _fit_masks_to_images() -> None:
    """Let masks have another size than their images: one batch would not hold them and those of normal images."""
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    wrap_function_wrapper("anomalib.data.datasets.base.image", "AnomalibDataset.__getitem__", _get_item)


def _get_item(get_item: Callable[..., Any], dataset: Any, args: tuple[int], kwargs: dict[str, int]) -> Any:
    """Wraps what reads an image and its mask, and augments them."""
    from torchvision.transforms.v2.functional import resize  # noqa: PLC0415

    def augment(image: Any, *masks: Any) -> Any:
        masks = tuple(mask if mask.shape[-2:] == image.shape[-2:] else resize(mask, image.shape[-2:]) for mask in masks)
        if augmentations:
            return augmentations(image, *masks)
        return (image, *masks) if masks else image

    augmentations, dataset.augmentations = dataset.augmentations, augment
    try:
        return get_item(*args, **kwargs)
    finally:
        dataset.augmentations = augmentations


def _show_every_picture() -> None:
    """Let heat maps be drawn on pictures as they are read for the model."""
    from anomalib_fractalad.image_files import open_rgb  # noqa: PLC0415

    module: Any = sys.modules["anomalib.visualization.image.item_visualizer"]
    module.Image = SimpleNamespace(open=open_rgb)


def _allow_every_script() -> None:
    """Let paths hold letters of any script: anomalib takes all but ASCII for characters that cannot be printed."""
    from anomalib_fractalad.image_files import has_control_characters  # noqa: PLC0415

    module: Any = sys.modules["anomalib.data.utils.path"]
    module.contains_non_printable_characters = has_control_characters


# torch may be imported from the middle of anomalib.data or anomalib.models. So each hook waits for a part that is
# always imported after torch and that holds all that the package's own modules need.
_HOOKS: dict[str, Callable[[], None]] = {
    "anomalib.data.datamodules": _publish_data_modules,
    "anomalib.data.datasets.base.image": _fit_masks_to_images,
    "anomalib.data.utils.image": _read_every_picture,
    "anomalib.data.utils.path": _allow_every_script,
    "anomalib.models.image": _publish_models,
    "anomalib.pipelines": _allow_own_class_paths,
    "anomalib.pipelines.benchmark.job": _join_benchmark_results,
    "anomalib.utils.config": _seed_command_line,
    "anomalib.visualization.image.item_visualizer": _show_every_picture,
}
