# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, and checkpoints that are damaged."""

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from conftest import make_tiles, small_engine, small_model
from killed_training import CASES, EPOCHS, POINTS, in_a_process, train

from anomalib_fractalad import FractalAD

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def unbroken(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Trains each model once, without a break and with a checkpoint after each step, when it is asked for."""

    @functools.cache
    def folder_of(name: str, validation: int) -> Path:
        folder = tmp_path_factory.mktemp(name)
        assert in_a_process(train, name, 0, tile_root, folder, every_step=1, validation=validation) == 0
        return folder

    return folder_of


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], prefix: str = "") -> None:
    assert len(ours) > 10
    for key, value in ours.items():
        assert torch.equal(value, theirs[prefix + key]), key


@pytest.mark.parametrize(("name", "point", "workers"), CASES)
def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    name: str, point: str, workers: int, unbroken: Callable[[str, int], Path], tile_root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    arguments, every_step = (name, workers, tile_root, folder), 2 * (point == "step")
    assert in_a_process(train, *arguments, POINTS[point](), every_step=every_step) == -signal.SIGKILL
    assert list(folder.glob("*.ckpt"))
    assert not (folder / "weights.pt").exists()
    assert in_a_process(train, *arguments, every_step=every_step) == 0
    assert_same_tensors(*(torch.load(each / "weights.pt") for each in (folder, unbroken(name, 1))))


@pytest.mark.parametrize("check_val_every_n_epoch", [1, 2])
def test_a_training_is_resumed_after_the_last_step_of_an_epoch(
    check_val_every_n_epoch: int, unbroken: Callable[[str, int], Path], tile_root: Path, tmp_path: Path
) -> None:
    """Lightning leaves the validation out that was due at that time, if it was."""
    before = unbroken("FractalAD", check_val_every_n_epoch)
    expected = torch.load(before / "weights.pt")
    for step in (3, 6):
        resumed, tiles = small_model("FractalAD"), make_tiles(tile_root)
        tiles.train_batch_size = 3
        engine = small_engine(tmp_path, max_epochs=EPOCHS, check_val_every_n_epoch=check_val_every_n_epoch)
        engine.fit(resumed, datamodule=tiles, ckpt_path=before / f"step={step}.ckpt")
        assert_same_tensors(resumed.model.state_dict(), expected, "model.")


@pytest.fixture(scope="module")
def checkpoint(unbroken: Callable[[str, int], Path]) -> bytes:
    return (unbroken("FractalAD", 1) / "step=9.ckpt").read_bytes()


@pytest.mark.parametrize("damage", ["cut off", "empty", "changed", "compression", "text"])
def test_a_damaged_checkpoint_is_named(checkpoint: bytes, damage: str, tmp_path: Path, tiles: Folder) -> None:
    middle = len(checkpoint) // 2
    compression = checkpoint.index(b"PK\x01\x02") + 10  # of the first entry of zip's table of contents
    content = {
        "cut off": checkpoint[:middle],
        "empty": b"",
        "changed": checkpoint[:middle] + bytes(64) + checkpoint[middle + 64 :],
        "compression": checkpoint[:compression] + b"\x0c" + checkpoint[compression + 1 :],
        "text": b"weights",
    }[damage]
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    message = rf"the checkpoint {path} is damaged .* Go on from another one"
    with pytest.raises(ValueError, match=message):
        FractalAD.load_from_checkpoint(path)
    for use in ("fit", "test"):
        with pytest.raises(ValueError, match=message):
            getattr(small_engine(tmp_path), use)(small_model("FractalAD"), datamodule=tiles, ckpt_path=path)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path,
    tiles: Folder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that is full after half a file."""

    def cut_off(_checkpoint: object, file: Any) -> None:
        file.write(b"half a file")
        raise OSError(file.name)

    kept = tmp_path / "model.ckpt"
    kept.write_bytes(b"the last checkpoint")
    monkeypatch.setattr("torch.save", cut_off)
    engine = small_engine(tmp_path / "run", max_epochs=1, callbacks=[ModelCheckpoint(tmp_path, "model")])
    monkeypatch.setattr(ModelCheckpoint, "file_exists", lambda *_: False)  # so that it takes the same name
    with pytest.raises(OSError, match=r"model\.ckpt\.part"):
        engine.fit(small_model("FractalAD"), datamodule=tiles)
    assert kept.read_bytes() == b"the last checkpoint"
