# SPDX-License-Identifier: Apache-2.0
"""AAND's features are kept, found again, and forgotten."""

import logging
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import make_tiles, small_engine
from lightning import seed_everything
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.feature_store import FeatureStore

ROOM = 2 * (4 * 4 * 4 + 4 * 2 * 2 * 2)  # bytes of the features of two images of 4x4


class Counter:
    """A network that counts the images it looks at."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.images += len(images)
        return [images[:, 0], 2 * images[:, :2, ::2, ::2]]


@pytest.mark.parametrize("memory", [0, ROOM, 2**20], ids=["on disk", "both", "in memory"])
def test_features_are_computed_once_wherever_they_lie(memory: int) -> None:
    compute, images = Counter(), torch.rand(5, 3, 4, 4)
    store = FeatureStore(compute, memory)
    for rows in ([0, 0, 1], [1, 2, 3], [4, 0], [3, 2, 1, 2]):
        for found, expected in zip(store(images[rows]), Counter()(images[rows]), strict=True):
            assert torch.equal(found, expected)
    assert compute.images == 5
    assert (store.hits, store.misses) == (5, 5)
    folder = Path(store._folder.name)
    assert len(list(folder.iterdir())) == {0: 5, ROOM: 3, 2**20: 0}[memory]
    store.close()
    assert not folder.exists()
    store(images)
    assert compute.images == 10


def test_features_without_room_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_fractalad.models.aand.feature_store.DISK_SHARE", 0)
    compute, images = Counter(), torch.rand(5, 3, 4, 4)
    store = FeatureStore(compute, ROOM)
    for _ in range(2):
        store(images)
    assert compute.images == 5 + 3


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "save", Mock(side_effect=OSError("No space left on device")))
    compute, images = Counter(), torch.rand(2, 3, 4, 4)
    store = FeatureStore(compute, 0)
    for _ in range(2):
        store(images)
    assert compute.images == 4
    assert [record.message for record in caplog.records if "No space left on device" in record.message] != []


def test_images_that_never_come_again_are_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    store = FeatureStore(Counter(), memory=0)
    folder = Path(store._folder.name)
    store.end_epoch()  # one of stage I
    for epoch in range(2):
        assert not any("No image came twice" in record.message for record in caplog.records), epoch
        store(torch.rand(2, 3, 4, 4))
        store.end_epoch()
    assert any("No image came twice" in record.message for record in caplog.records)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("augmented", [False, True])
def test_a_training_that_keeps_features_is_the_same_and_looks_at_each_image_once(
    augmented: bool, tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    weights, looks = [], []
    for keep in (False, True):
        seed_everything(1)
        model = AAND(
            backbone="test_resnet",
            pre_trained=False,
            keep_features=keep,
            pre_processor=AAND.configure_pre_processor((64, 64)),
            visualizer=False,
        )
        tiles = make_tiles(tile_root)
        if augmented:
            tiles.train_augmentations = RandomHorizontalFlip()
        teacher = Mock(side_effect=model.model.advanced_teacher)
        monkeypatch.setattr(model.model, "advanced_teacher", teacher)
        small_engine(tmp_path / str(keep), max_epochs=4, limit_val_batches=0).fit(model, datamodule=tiles)
        assert model._store is None
        weights.append(model.model.state_dict())
        looks.append(sum(len(call.args[0]) for call in teacher.call_args_list))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4)
    assert looks[0] == 16  # two epochs of stage II
    assert 8 < looks[1] <= 16 if augmented else looks[1] == 8
    assert not list(tmp_path.glob("features-*"))
