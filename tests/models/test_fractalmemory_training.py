# SPDX-License-Identifier: Apache-2.0
"""FractalMemory's training: its stages, resuming, and what it exports."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, ImageBatch
from conftest import make_tiles, small_engine
from lightning import Callback, seed_everything

from anomalib_fractalad.models.fractalmemory import FractalMemory
from anomalib_fractalad.models.fractalmemory.calibration import WEIGHTS
from anomalib_fractalad.models.fractalmemory.stages import Stage
from anomalib_fractalad.transforms import LightingJitter

pytestmark = pytest.mark.slow

STEPS_PER_EPOCH = 2


def small_model(**arguments: Any) -> FractalMemory:
    size = {"pre_processor": FractalMemory.configure_pre_processor((64, 64))}
    given = {"head": True, **size, **arguments}
    return FractalMemory(backbone="test_resnet", pre_trained=False, visualizer=False, **given)


class Watch(Callback):
    """Notes, before each step, what a training consists of."""

    def __init__(self) -> None:
        self.heads: list[torch.Tensor] = []
        self.memories: list[torch.Tensor] = []
        self.stages: list[Stage] = []
        self.last: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Any, model: Any, *_: Any) -> None:
        del trainer
        self.heads.append(torch.cat([parameter.detach().flatten() for parameter in model.model.head.parameters()]))
        self.memories.append(model.model.memory.items.clone())
        self.stages.append(model.stage)


@pytest.fixture(scope="module")
def trained(tile_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    seed_everything(1)
    model, watch, folder = small_model(), Watch(), tmp_path_factory.mktemp("trained")
    watch.keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    engine = small_engine(folder, max_epochs=5, callbacks=[watch, watch.keep])
    engine.fit(model, datamodule=make_tiles(tile_root))
    watch.last = {key: value.clone() for key, value in model.model.state_dict().items()}
    watch.calibration = model._calibration  # which an export drops
    return model, engine, watch


def test_the_first_epoch_gathers_and_the_others_train_the_head(trained: Any) -> None:
    model, _, watch = trained
    assert watch.stages == [Stage.GATHERING] * STEPS_PER_EPOCH + [Stage.HEAD] * (4 * STEPS_PER_EPOCH)
    first, *gathered = watch.heads[: STEPS_PER_EPOCH + 1]
    assert all(torch.equal(head, first) for head in gathered)
    for before, after in zip(watch.heads[STEPS_PER_EPOCH:-1], watch.heads[STEPS_PER_EPOCH + 1 :], strict=True):
        assert not torch.equal(before, after)
    assert watch.memories[STEPS_PER_EPOCH - 1].count_nonzero() == 0
    assert all(torch.equal(memory, model.model.memory.items) for memory in watch.memories[STEPS_PER_EPOCH:])
    assert len(model.model.memory.owners.unique()) == 8  # every image has a share


def test_it_finds_the_defects(trained: Any, tiles: Folder) -> None:
    model, engine, _ = trained
    (result,) = engine.test(model, datamodule=tiles)
    assert result["image_AUROC"] == 1
    assert result["pixel_AUROC"] > 0.8


@pytest.mark.parametrize("step", [1, 2, 3, 5])  # within the gathering, at its end, and within the training of the head
def test_a_resumed_training_ends_with_the_same_weights(
    step: int, trained: Any, tile_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seed_everything(99)
    resumed = small_model()
    checkpoint = Path(trained[2].keep.dirpath) / f"step={step}.ckpt"
    small_engine(tmp_path, max_epochs=5).fit(resumed, datamodule=make_tiles(tile_root), ckpt_path=checkpoint)
    for name, value in trained[2].last.items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    says_gathers = any("gathers normal features" in record.message for record in caplog.records)
    assert says_gathers == (step < STEPS_PER_EPOCH)


def test_images_are_compared_without_their_own_part(trained: Any) -> None:
    model, _, _ = trained
    seen: list[torch.Tensor] = []

    def note(features: Any, hidden: torch.Tensor) -> Any:
        seen.append(hidden)
        return compare(features, hidden)

    compare, owners = model.model.compare, model.model.memory.owners
    parts = owners.unique()[:5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model, "compare", note)
        model._segment(torch.rand(5, 3, 64, 64), parts)
    (hidden,) = seen
    assert len(hidden) == 7  # the anomalous images, then two normal ones
    for image, part in enumerate(parts):
        assert hidden[image][owners == part].all()
        assert not hidden[image].all(dim=0).any()
    assert all(any(row[owners == part].all() for part in parts) for row in hidden[5:])


def test_parts_are_told_by_the_names_of_files() -> None:
    paths = ["a/part1_view1.png", "b/part1_view2.png", "a/part2_view1.png"]
    batch = ImageBatch(image=torch.rand(3, 3, 8, 8), image_path=paths)
    alone, grouped = (
        small_model(part_pattern=pattern).owners_of(batch).tolist() for pattern in (None, r"part(\d+)_view")
    )
    assert len(set(alone)) == 3
    assert grouped[0] == grouped[1] != grouped[2]
    with pytest.raises(ValueError, match=r"finds nothing in the name of a/part1_view1\.png"):
        small_model(part_pattern="tile").owners_of(batch)


def test_a_head_that_does_harm_does_not_count(trained: Any) -> None:
    model, _, watch = trained
    network, calibrate = model.model, watch.calibration
    state = {key: value.clone() for key, value in network.state_dict().items()}
    truth = {id(sample.residual): sample.mask for sample in calibrate._samples}
    assert len(truth) == 4  # one image is kept aside; in two lights, without and with a defect
    (image,), own = calibrate.images, network.memory.own(calibrate.owners)
    residual, _ = network.compare(network.teacher(image.float().unsqueeze(0)), own)
    torch.testing.assert_close(calibrate._samples[0].residual, residual.detach())

    def oracle(sign: float) -> Any:
        def logit(residual: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
            size = [2 * side for side in distance.shape[-2:]]
            return sign * 8 * (2 * torch.nn.functional.interpolate(truth[id(residual)].float(), size, mode="area") - 1)

        return logit

    try:
        for sign, trained_head, weight in ((-1, True, 0), (1, True, max(WEIGHTS)), (1, False, 0)):
            network.head.forward = oracle(sign)
            calibrate(network, trained=trained_head)
            assert network.vote.weight.item() == pytest.approx(weight, abs=1e-6)
    finally:
        del network.head.forward
        network.load_state_dict(state)


def test_images_have_320_pixels_a_side_unless_told_otherwise() -> None:
    images = torch.rand(1, 3, 40, 60)
    given = (48, 64)
    model = FractalMemory("test_resnet", pre_trained=False, memory_size=5, visualizer=False)
    assert model.pre_processor(images).shape[-2:] == (320, 320)
    assert FractalMemory.configure_pre_processor(given)(images).shape[-2:] == given


def test_an_endless_training_is_refused(tiles: Folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_epochs is -1; FractalMemory"):
        small_engine(tmp_path, max_epochs=-1).fit(small_model(), datamodule=tiles)


def test_a_training_of_one_step_has_a_memory_and_no_head(tiles: Folder, tmp_path: Path) -> None:
    model = small_model(memory_size=50, reservoir_size=60)
    assert model.is_untrained()
    engine = small_engine(tmp_path, max_steps=1)
    engine.fit(model, datamodule=tiles)
    assert not model.is_untrained()
    assert model.model.memory.items.count_nonzero() > 0
    assert model.model.vote.weight == 0
    # What changes no prediction of a trained model, and the score, the smoothing and the saturation, may be given anew.
    checkpoint = tmp_path / "model.ckpt"
    engine.trainer.save_checkpoint(checkpoint)
    loaded = FractalMemory.load_from_checkpoint(checkpoint, sigma=2, saturation=0.5)
    assert torch.equal(loaded.model.memory.items, model.model.memory.items)
    assert (loaded.model.saturation.strength, model.model.saturation.strength) == (0.5, 1.0)
    assert (loaded.model.smooth.radius, model.model.smooth.radius) == (8, 20)
    with pytest.raises(ValueError, match="memory_size is 40 here, and 50 there"):
        FractalMemory.load_from_checkpoint(checkpoint, memory_size=40)


def test_without_a_head_one_epoch_is_all(tile_root: Path, tmp_path: Path) -> None:
    model = small_model(head=False, epochs=3)
    engine = small_engine(tmp_path, max_epochs=5)
    engine.fit(model, datamodule=make_tiles(tile_root))
    assert engine.trainer.global_step == STEPS_PER_EPOCH
    assert len(model.model.memory.owners.unique()) == 8
    (result,) = engine.test(model, datamodule=make_tiles(tile_root))
    assert result["image_AUROC"] == 1
    assert result["pixel_AUROC"] > 0.8
    loaded = FractalMemory.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path, head=False)
    assert torch.equal(loaded.model.memory.items, model.model.memory.items)


def test_a_memory_of_changed_light_minds_it_less(tile_root: Path, tmp_path: Path) -> None:
    """The distance of test images in another light, in units of what is usual, with and without copies in memory."""
    excess = []
    for lighting in (0.0, 1.0):
        seed_everything(2)
        model = small_model(head=False, lighting=lighting)
        data = make_tiles(tile_root)
        small_engine(tmp_path / str(lighting), max_epochs=1).fit(model, datamodule=data)
        images = torch.stack([item.image for item in data.train_data])
        images = torch.nn.functional.interpolate(images, (64, 64), mode="bilinear")
        torch.manual_seed(3)
        changed = LightingJitter()(images)
        with torch.no_grad():
            network = model.model
            plain, other = (network.distances(network.teacher(part)).sum(dim=1).mean() for part in (images, changed))
        excess.append(float(other / plain))
        assert len(model.model.memory.owners.unique()) == 8
    assert 1 < excess[1] < 0.5 * excess[0]
