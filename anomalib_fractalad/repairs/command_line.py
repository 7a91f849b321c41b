# SPDX-License-Identifier: Apache-2.0
"""The ``anomalib`` program takes ``--seed_everything`` and does nothing with it."""

from collections.abc import Callable
from typing import Any

from .base import Repair

_for_all = False


def _apply(for_all: bool) -> None:
    global _for_all  # noqa: PLW0603
    from wrapt import wrap_function_wrapper  # noqa: PLC0415

    _for_all = for_all
    wrap_function_wrapper("anomalib.utils.config", "update_config", _seed_and_update_config)


def _seed_and_update_config(
    update_config: Callable[..., Any], _: None, args: tuple[Any], kwargs: dict[str, Any]
) -> Any:
    """Wraps what anomalib's program calls between reading the configuration and building the model.

    As in Lightning's own program, the seed is set before the model is built, and logged; left out, it is
    ``PL_GLOBAL_SEED`` of the environment, or 0.
    """
    from anomalib_fractalad.registration import MODELS  # noqa: PLC0415

    config = update_config(*args, **kwargs)
    model, seed = config.get("model"), config.get("seed_everything", False)
    own = getattr(model, "class_path", "").rpartition(".")[2] in MODELS
    if (own or _for_all) and seed is not False:
        from lightning.pytorch import seed_everything  # noqa: PLC0415

        config["seed_everything"] = seed_everything(None if seed is True else seed, workers=True)
    return config


COMMAND_LINE = Repair(
    name="seed of the program",
    defect="The anomalib program takes --seed_everything and does nothing with it.",
    versions=">=2.7,<2.8",
    modules=("anomalib.utils.config",),
    apply=_apply,
)
