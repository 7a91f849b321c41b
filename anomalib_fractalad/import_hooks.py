# SPDX-License-Identifier: Apache-2.0
"""Calls just before a package is imported, and when a module has been."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_waiting: dict[str, list[Callable[[], None]]] = {}


def before_import(package: str, hook: Callable[[], None]) -> None:
    """Call a hook just before a package is imported for the first time, or at once if it has been.

    Args:
        package: Name of a top-level package.
        hook: What is called; it must not raise.
    """
    if any(name.partition(".")[0] == package for name in sys.modules):
        hook()
        return
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    _waiting.setdefault(package, []).append(hook)


class _Watcher:
    """Looks for nothing, but learns by what is looked for."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        del path, target
        hooks = _waiting.pop(fullname.partition(".")[0], None)
        if hooks is None:
            return None
        if not _waiting:
            sys.meta_path.remove(self)
        for hook in hooks:
            hook()
        return find_spec(fullname)


def when_imported(name: str, hook: Callable[[], None]) -> None:
    """Call a hook when a module has been imported as a whole, or at once if it has been.

    Args:
        name: Full name of a module within a package.
        hook: What is called.
    """
    from wrapt import register_post_import_hook  # noqa: PLC0415  # it takes longer than all the rest

    parent, _, child = name.rpartition(".")
    if name not in sys.modules:
        register_post_import_hook(lambda _module: hook(), name)
    elif child in vars(sys.modules[parent]):
        hook()
    else:  # in the middle of its import, at whose end it is bound in its parent
        _AwaitsChild.expect(sys.modules[parent], child, hook)


def unfinished(package: str) -> str | None:
    """Find the module below a package that has been in the middle of its import for longest, if there is any.

    Args:
        package: Name of a top-level package.

    Returns:
        Its full name.
    """
    for name in list(sys.modules):
        parent, _, child = name.rpartition(".")
        if name.startswith(f"{package}.") and parent in sys.modules and child not in vars(sys.modules[parent]):
            return name
    return None


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
