# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files that are whole or not there."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

UNSYNCED = {"fsync": False}
_LIGHTNINGS_WORDS = {"best", "last", "hpc"}


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when the disk has it; loads none that is damaged.

    Lightning writes into the system's temporary folder first. Where that is another disk, the move is a copy, and a
    process that is killed then leaves half a file in place of its last checkpoint. It also holds the file in memory
    twice, which takes longer.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to write.
            path: The file; one that is there already is replaced. A remote address is left to Lightning.
            storage_options: :data:`UNSYNCED` to not wait for the disk: the file then survives the death of the
                process, but perhaps not that of the machine. Anything else as for Lightning's own.
        """
        synced = storage_options != UNSYNCED
        if "://" in str(path) or (synced and storage_options is not None):
            super().save_checkpoint(checkpoint, path, storage_options if synced else None)
            return
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            if synced:
                file.flush()
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
            FileNotFoundError: If there is none.
        """
        check_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)


class AtomicCheckpoints(Callback):
    """Has a trainer write and load checkpoints by :class:`AtomicCheckpointIO`; another plugin for it is left alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place of anomalib's and Lightning's own."""
        del stage
        strategy = trainer.strategy
        if type(strategy.checkpoint_io) in {AnomalibCheckpointIO, TorchCheckpointIO}:
            safe: Sequence[Any] = getattr(type(pl_module), "checkpoint_safe_globals", tuple)()
            strategy.checkpoint_io = AtomicCheckpointIO(safe)


def check_checkpoint(file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Refuse a checkpoint that was cut off or changed; torch itself does not look at the checksums.

    Args:
        file: The file, by its path or opened to be read in binary; then it stays at its position. A path that does
            not exist, and a remote address, are left to those that read it.

    Raises:
        ValueError: If the file is damaged.
        FileNotFoundError: If the path stems from a word that only Lightning's trainer knows.
    """
    if isinstance(file, str | os.PathLike):
        _check_path(Path(file))
        return
    position = file.tell()
    try:
        _check(file, f"the checkpoint {getattr(file, 'name', 'in the file object')}")
    finally:
        file.seek(position)


def _check_path(path: Path) -> None:
    if path.is_file():
        _check(path, f"the checkpoint {path}")
    elif path.name in _LIGHTNINGS_WORDS and not path.exists():
        msg = (
            f"{path} does not exist: anomalib's Engine takes ckpt_path={path.name!r} for the name of a file. Give the "
            "file itself, such as engine.best_model_path, or give no model: the best checkpoint of the last fit is "
            "loaded then."
        )
        raise FileNotFoundError(msg)


def _check(file: Path | IO[bytes], name: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and the decoders raise nearly everything
        if isinstance(error, OSError) and error.errno is not None:
            raise
        damaged = str(error) or type(error).__name__
    if damaged is not None:
        msg = (
            f"{name} is damaged ({damaged}): it was cut off while it was written or copied, or is no "
            "checkpoint. Go on from another one."
        )
        raise ValueError(msg)
