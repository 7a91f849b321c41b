# SPDX-License-Identifier: Apache-2.0
"""Which arguments of a model its user gave on purpose."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

COMPONENTS = ("pre_processor", "post_processor", "evaluator", "visualizer")
_BUILDERS = {"jsonargparse", "lightning.pytorch.cli"}


def note_given(init: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor note, as ``given_arguments`` of the new object, the names of the arguments it was called with.

    A program that builds objects from its command line and config files gives all arguments. Of these, it notes those
    that are named there, and those that are not at their defaults.

    Args:
        init: The constructor. Where constructors call each other, an argument that the outermost one takes counts as
            given if it was given to that one.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        # A module must not be written to before it is initialized, except like this.
        known: set[str] = self.__dict__.setdefault("_known_arguments", set())
        given: set[str] = self.__dict__.setdefault("given_arguments", set())
        try:
            values = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            values = {}  # which the call below raises better
        values = {**values, **values.pop("kwargs", {})}
        named = _named_by_user(sys._getframe(1))  # noqa: SLF001
        for name in values.keys() - known - {"self"}:
            default = signature.parameters[name].default if name in signature.parameters else inspect.Parameter.empty
            is_default = values[name] is default or _equal(values[name], default)
            switched_on = name in COMPONENTS and values[name] is True
            if not switched_on and (named is None or name in named or not is_default):
                given.add(name)
        known.update(signature.parameters)
        init(self, *args, **kwargs)

    return noting


def plain(value: Any) -> Any:
    """A value as a checkpoint or a YAML file may hold it, for comparison: lists for tuples, text for paths.

    Args:
        value: The value.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _equal(one: Any, other: Any) -> bool:
    one, other = plain(one), plain(other)
    return type(one) is type(other) and isinstance(one, str | int | float | list | dict) and one == other


def _named_by_user(frame: FrameType | None) -> set[str] | None:
    """The model's arguments on the command line and in the config files; ``None`` where no program builds the model."""
    if frame is None or not _is_builder(frame):
        return None
    named: set[str] = set()
    while frame is not None:
        parser = frame.f_locals.get("self")
        if frame.f_code.co_name == "instantiate_classes" and isinstance(getattr(parser, "args", None), list):
            named.update(_names_in(parser.args))  # type: ignore[union-attr]
        frame = frame.f_back
    return named


def _is_builder(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__", "")
    return module in _BUILDERS or module.partition(".")[0] in _BUILDERS


def _names_in(tokens: Sequence[str]) -> Iterator[str]:
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        option, has_value, value = token.partition("=")
        if not token.startswith("-"):
            continue
        value = value if has_value else following
        head, *path = option.lstrip("-").split(".")
        if head in {"config", "c"} and not path:
            yield from _names_of_config(_read(value))
        elif head == "model":
            path = path[1:] if path[:1] == ["init_args"] else path
            yield from path[:1] or _names_of_model(_read(value))


def _names_of_config(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for level in (config, *config.values()):  # the second holds a subcommand
            if isinstance(level, Mapping) and "model" in level:
                yield from _names_of_model(level["model"])


def _names_of_model(model: Any) -> Iterator[str]:
    model = _read(model) if isinstance(model, str) else model
    if isinstance(model, Mapping):
        arguments = model.get("init_args", model)
        yield from (str(name) for name in arguments or () if name != "class_path")


def _read(value: str) -> Any:
    """The content of a file, or of text in its place; nothing if it is no YAML."""
    try:
        return yaml.safe_load(Path(value).read_text() if Path(value).is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):
        return None
