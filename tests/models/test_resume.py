# SPDX-License-Identifier: Apache-2.0
"""Training that is killed, and checkpoints that are damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from conftest import assert_same_weights, make_tiles, run_script, small_engine, small_model
from killed_training import CASES

from anomalib_fractalad import FractalAD
from anomalib_fractalad.registration import MODELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_script(Path(__file__).with_name("killed_training.py"), tile_root, folder)
    return folder


@pytest.mark.parametrize(("point", "workers"), CASES)
@pytest.mark.parametrize("name", MODELS)
def test_a_killed_and_resumed_training_ends_with_the_same_weights(
    results: Path, name: str, point: str, workers: int
) -> None:
    unbroken = torch.load(results / name / "unbroken" / "weights.pt")
    resumed = torch.load(results / name / str(workers) / point / "weights.pt")
    assert len(unbroken) > 10
    for (key, ours), theirs in zip(unbroken.items(), resumed.values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("check_val_every_n_epoch", [1, 2])
def test_a_training_is_resumed_after_the_last_step_of_an_epoch(
    check_val_every_n_epoch: int, tile_root: Path, tmp_path: Path
) -> None:
    """Lightning leaves the validation out that was due at that time, if it was."""
    arguments = {"max_epochs": 4, "check_val_every_n_epoch": check_val_every_n_epoch}
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    unbroken = small_model("FractalAD")
    small_engine(tmp_path, callbacks=[keep], **arguments).fit(unbroken, datamodule=make_tiles(tile_root))
    for step in (2, 4):
        resumed = small_model("FractalAD")
        checkpoint = tmp_path / f"step={step}.ckpt"
        small_engine(tmp_path, **arguments).fit(resumed, datamodule=make_tiles(tile_root), ckpt_path=checkpoint)
        assert_same_weights(resumed, unbroken)


@pytest.fixture(scope="module")
def checkpoint(results: Path) -> bytes:
    return (results / "FractalAD" / "unbroken" / "model.ckpt").read_bytes()


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
