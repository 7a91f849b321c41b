# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files that are whole or not there."""

import os
import zipfile
from pathlib import Path
from typing import Any

from anomalib.engine.plugins import AnomalibCheckpointIO


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when the disk has it; loads none that is damaged.

    Lightning writes into the system's temporary folder first. Where that is another disk, the move is a copy, and a
    process that is killed then leaves half a file in place of its last checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: The file; one that is there already is replaced. A remote address is left to Lightning.
            storage_options: As for Lightning's own.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: The file.
            *args: As for anomalib's own.
            **kwargs: Likewise.

        Returns:
            Its content.

        Raises:
            ValueError: If the file is damaged.
        """
        check_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint that was cut off or changed; torch itself does not look at the checksums.

    Args:
        path: The file. One that does not exist, and a remote address, are left to those that read it.

    Raises:
        ValueError: If the file is damaged.
    """
    if not Path(path).is_file():
        return
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # zipfile and the decoders raise nearly everything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        damaged = str(error) or type(error).__name__
    if damaged is not None:
        msg = (
            f"the checkpoint {path} is damaged ({damaged}): it was cut off while it was written or copied, or is no "
            "checkpoint. Go on from another one."
        )
        raise ValueError(msg)
