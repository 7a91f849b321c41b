# SPDX-License-Identifier: Apache-2.0
"""Models that take the arguments of a checkpoint over, so that they score as they were trained to."""

import inspect
import io
import logging
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any, ClassVar

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.pytorch.utilities import rank_zero_only

from .checkpoint_io import check_checkpoint
from .given_arguments import COMPONENTS, note_given, plain

# anomalib lists only the direct subclasses of AnomalibModule, so what models share has to come from beside it.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object

logger = logging.getLogger(__name__)

_CONFIGS = {"pre_processor": "anomalib_pre_processor_config", "post_processor": "anomalib_post_processor_config"}
# A checkpoint holds the weights, and the trainer has its length already.
_WITHOUT_EFFECT = {"pre_trained", "weights", "epochs", "anomaly_source_path", *COMPONENTS}


class CheckpointArguments(_Base):
    """Lets a checkpoint's arguments count where its model was made with others, and says so.

    An argument that the user gave on purpose wins: to the constructor or ``load_from_checkpoint``, on the command line,
    or in its config file. Where it changes the shape of the network, the checkpoint is refused. The same holds for the
    settings of pre-processor and post-processor.

    Attributes:
        given_arguments: Names of the constructor's arguments that the user gave on purpose.
        architecture: Arguments that change the network's shape, and what part of their values does.
        training_only: Arguments that do not change what a trained model predicts.
    """

    given_arguments: set[str]
    architecture: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"backbone": str}
    training_only: ClassVar[frozenset[str]] = frozenset({"learning_rate"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = note_given(cls.__init__)  # type: ignore[method-assign]

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; its weights are loaded next.

        Args:
            arguments: All arguments of the constructor but those of its components. Those that change the network's
                shape are as they were.
        """
        for name, value in arguments.items():
            if name in self.__dict__ and name not in _WITHOUT_EFFECT:
                setattr(self, name, value)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the arguments over, and those of pre-processor and post-processor.

        Raises:
            ValueError: If the checkpoint is of a network of another shape.
        """
        self._take_post_processor(checkpoint)
        recorded = dict(checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        changes = _Changes(type(self), dict(self.hparams), recorded, self.given_arguments, fitting=fitting)
        before = {name: getattr(self, name, None) for name in COMPONENTS}
        given = {name: before[name] for name in COMPONENTS if name in self.given_arguments}
        settings = _keep_components(checkpoint, before, given)
        if self._trainer is None:  # nobody made this model with the settings that it has
            settings = {name: values for name, values in settings.items() if name.partition(".")[0] in given}
        changes.tell(settings, given)
        if changes.taken:
            self.hparams.update(changes.taken)
            self.apply_arguments(dict(self.hparams))
        if fitting:
            _keep_rates(checkpoint, changes.kept)
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None:
            return
        if any(name.startswith("pre_processor") for name in settings):
            # The data module was set up for the pre-processor from before, and resizes images to its size.
            getattr(getattr(self.trainer, "datamodule", None), "_update_augmentations", bool)()
        # The trainer's callbacks are those from before, too.
        dropped = [part for name, part in before.items() if part is not None and getattr(self, name) is None]
        trainer: Any = self.trainer
        trainer.callbacks = [call for call in trainer.callbacks if not any(call is part for part in dropped)]

    def _take_post_processor(self, checkpoint: Mapping[str, Any]) -> None:
        """Take a threshold of false alarms over where no other post-processor was given: it is a promise."""
        from anomalib_fractalad.post_processing import FalseAlarmThreshold  # noqa: PLC0415

        config, ours = checkpoint.get(_CONFIGS["post_processor"]) or {}, self.post_processor
        if "false_alarms" not in config or "post_processor" in self.given_arguments:
            return
        if ours is None or isinstance(ours, FalseAlarmThreshold):
            return
        self.post_processor = FalseAlarmThreshold().to(self.device)
        self.post_processor.load_checkpoint_config(config)
        if self._trainer is not None:
            logger.warning("The checkpoint was trained with FalseAlarmThreshold, which counts here, too.")
            trainer: Any = self.trainer
            trainer.callbacks = [self.post_processor if call is ours else call for call in trainer.callbacks]

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a trained model; no pre-trained weights are fetched, since the checkpoint holds the teacher's.

        Args:
            checkpoint_path: A Lightning checkpoint: its path, or a file opened to be read in binary.
            *args: As for :meth:`anomalib.models.AnomalibModule.load_from_checkpoint`.
            **kwargs: Likewise; also arguments of the model to override.

        Raises:
            ValueError: If the file is damaged, or an argument changes the shape of the network.
        """
        check_checkpoint(checkpoint_path)
        own = {name: value for name, value in kwargs.items() if name in inspect.signature(cls.__init__).parameters}
        at_hand = _model_to_export(cls)
        if at_hand is not None:
            own = {**at_hand.given_values(), **own}
        if at_hand is not None or own.keys() - _WITHOUT_EFFECT:
            ours = dict(at_hand.hparams) if at_hand is not None else own
            recorded = _recorded_arguments(cls, checkpoint_path)
            changes = _Changes(cls, {**ours, **own}, recorded, set(own), check=kwargs.get("strict") is not False)
            changes.tell({}, {})
        kwargs = {**own, **kwargs}
        if "weights" not in kwargs:
            kwargs = {"pre_trained": False, "weights": None, **kwargs}
        model: Any = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)  # type: ignore[arg-type]
        model.given_arguments = {name for name in own if not (name in COMPONENTS and own[name] is True)}
        return model

    def given_values(self) -> dict[str, Any]:
        """The arguments that the user gave on purpose, by name, but those that a checkpoint brings."""
        names = self.given_arguments - (_WITHOUT_EFFECT - set(COMPONENTS))
        components = {name: getattr(self, name) or False for name in COMPONENTS if name in names}
        return {**{name: self.hparams[name] for name in names if name in self.hparams}, **components}


class _Changes:
    """What differs between a model's arguments and a checkpoint's.

    Attributes:
        taken: The checkpoint's values that count.
        kept: The checkpoint's values that do not, because the user gave others.
    """

    def __init__(
        self,
        model: type[CheckpointArguments],
        ours: Mapping[str, Any],
        recorded: Mapping[str, Any],
        given: set[str],
        *,
        fitting: bool = False,
        check: bool = True,
    ) -> None:
        self._model, self._ours = model, ours
        self._silent = set() if fitting else set(model.training_only)
        differing = {
            name: recorded[name]
            for name in ours.keys() & recorded.keys() - _WITHOUT_EFFECT
            if plain(ours[name]) != plain(recorded[name])
        }
        if check:
            self._refuse_other_networks(differing)
        self.taken = {name: value for name, value in differing.items() if name not in given}
        self.kept = {name: (ours[name], value) for name, value in differing.items() if name in given}

    def _refuse_other_networks(self, differing: Mapping[str, Any]) -> None:
        shapes = {name: part for name, part in self._model.architecture.items() if name in differing}
        others = [name for name, part in shapes.items() if part(self._ours[name]) != part(differing[name])]
        if others:
            lines = [f"{name} is {self._ours[name]!r} here, and {differing[name]!r} there" for name in others]
            remedy = ", ".join(f"{name}={differing[name]!r}" for name in others)
            msg = (
                f"the checkpoint's network is not that of this {self._model.__name__}: {'; '.join(lines)}. Give "
                f"{remedy} (in anomalib's program, {' '.join(f'--model.{name}' for name in others)})."
            )
            raise ValueError(msg)

    @rank_zero_only
    def tell(self, settings: Mapping[str, tuple[Any, Any]], given: Mapping[str, Any]) -> None:
        """Name every difference.

        Args:
            settings: Ours and the checkpoint's values of the components' settings that differ.
            given: The components that the user gave.
        """
        taken = {name: (self._ours[name], value) for name, value in self.taken.items() if name not in self._silent}
        kept = {name: values for name, values in self.kept.items() if name not in self._silent}
        for name, values in settings.items():
            (kept if name.partition(".")[0] in given else taken)[name] = values
        name = self._model.__name__
        for argument, (ours, theirs) in sorted(taken.items()):
            logger.warning(
                "The checkpoint was trained with %s=%s, and this %s was made with %s: the checkpoint's counts.",
                *(argument, _short(theirs), name, _short(ours)),
            )
        for argument, (ours, theirs) in sorted(kept.items()):
            logger.warning(
                "The checkpoint was trained with %s=%s, and this %s was given %s: that counts. Validate once more, for "
                "the thresholds.",
                *(argument, _short(theirs), name, _short(ours)),
            )


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 300)


def _keep_components(
    checkpoint: dict[str, Any], before: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Keep a checkpoint from changing the components that the user gave; gives the settings that differ."""
    flags = dict(checkpoint.get("anomalib_components_enabled") or {})
    differing = {}
    for name, key in _CONFIGS.items():
        component = before[name]
        ours = component.checkpoint_config() if hasattr(component, "checkpoint_config") else None
        theirs = checkpoint.get(key) if flags.get(name, True) else None
        if name in flags and (component is None) != (not flags[name]):
            differing[name] = (component is not None, flags[name])
        elif ours is not None and theirs is not None:
            unequal = [k for k in ours.keys() & theirs.keys() if plain(ours[k]) != plain(theirs[k])]
            differing.update({f"{name}.{k}": (ours[k], theirs[k]) for k in unequal})
        if name in given:
            checkpoint.pop(key, None)
    checkpoint["anomalib_components_enabled"] = {**flags, **dict.fromkeys(given, True)}
    return differing


def _keep_rates(checkpoint: dict[str, Any], kept: Mapping[str, tuple[Any, Any]]) -> None:
    """Let a training go on with the learning rate and weight decay that the user gave; optimizers restore theirs."""
    groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
    if "weight_decay" in kept:
        for group in groups:
            group["weight_decay"] = kept["weight_decay"][0]
    if "learning_rate" in kept:
        ours, theirs = kept["learning_rate"]
        for entry in (*groups, *checkpoint.get("lr_schedulers", [])):
            for name in ("lr", "initial_lr"):
                if name in entry:
                    entry[name] *= ours / theirs
            for name in ("base_lrs", "_last_lr"):
                if name in entry:
                    entry[name] = [rate * ours / theirs for rate in entry[name]]


def _model_to_export(cls: type) -> CheckpointArguments | None:
    """The model that anomalib's Engine.export is called with, and drops when it loads a checkpoint in its place."""
    from anomalib.engine import Engine  # noqa: PLC0415  # whose import may have brought in this package

    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    model = caller.f_locals.get("model") if caller is not None and caller.f_code is Engine.export.__code__ else None
    return model if type(model) is cls and isinstance(model, CheckpointArguments) else None


def _recorded_arguments(cls: type[AnomalibModule], file: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """The arguments in a checkpoint, without its tensors where it is a file on a disk."""
    try:
        with anomalib_safe_globals(extra=cls.checkpoint_safe_globals()):
            if isinstance(file, str | os.PathLike) and Path(file).is_file():
                content = torch.load(file, "cpu", weights_only=True, mmap=True)
            elif not isinstance(file, str | os.PathLike):
                content = torch.load(io.BytesIO(file.read()), "cpu", weights_only=True)
                file.seek(0)
            else:
                return {}
    except (UnpicklingError, RuntimeError):  # which loading it names
        return {}
    return dict(content.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {})
