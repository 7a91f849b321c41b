# SPDX-License-Identifier: Apache-2.0
"""Gray images of more than 8 bits are read as white, and errors for broken files do not name the file."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from .base import Repair
from .replacing import replaced

_READERS = ("read_image", "read_mask")


def _apply(for_all: bool) -> None:
    """For every model: replace anomalib's readers wherever they have been imported already."""
    if not for_all:
        return  # data sets and inferencers of this package's models read through ``repaired_reading``
    from anomalib_fractalad import image_files  # noqa: PLC0415

    module = sys.modules["anomalib.data.utils.image"]
    for name in _READERS:
        original, replacement = getattr(module, name), getattr(image_files, name)
        for key, user in list(sys.modules.items()):
            if key.startswith("anomalib.") and getattr(user, "__dict__", {}).get(name) is original:
                setattr(user, name, replacement)


@contextmanager
def repaired_reading(kind: type) -> Iterator[None]:
    """Have anomalib's classes read images and masks by this package's readers.

    Args:
        kind: A class; readers are replaced in the modules that it and its bases come from.
    """
    from anomalib_fractalad import image_files  # noqa: PLC0415

    modules = {base.__module__ for base in kind.__mro__ if base.__module__.startswith("anomalib.")}
    with ExitStack() as stack:
        for module in modules:
            for name in _READERS:
                if name in vars(sys.modules[module]):
                    stack.enter_context(replaced(module, name, getattr(image_files, name)))
        yield


IMAGE_READING = Repair(
    name="image reading",
    defect="Gray images of more than 8 bits are read as white, and errors for broken files do not name the file.",
    versions=">=2.7,<2.8",
    modules=("anomalib.data.utils.image",),
    apply=_apply,
)
