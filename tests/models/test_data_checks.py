# SPDX-License-Identifier: Apache-2.0
"""What is checked of the data before work is lost: normalization, values, masks, and loaders of every kind."""

import ast
import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from conftest import make_tiles, save, small_engine, tile_arguments
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from PIL import Image
from test_all_models import small_model
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision import transforms as v1
from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, RandomApply, RandomChoice, Resize

import anomalib_fractalad
from anomalib_fractalad.image_files import UnreadableImageError
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.training import image_check
from anomalib_fractalad.training.image_check import ImageCheck, check_images
from anomalib_fractalad.training.plain_images import find_normalize

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def batches(low: float = 0, high: float = 1) -> list[ImageBatch]:
    images = low + (high - low) * torch.rand(2, 2, 3, 64, 64)
    return [ImageBatch(image=image, gt_label=torch.tensor([False, True])) for image in images]


class Loader:
    """Any iterable of batches, with a length or without."""

    def __init__(self, low: float = 0, high: float = 1) -> None:
        self.batches = batches(low, high)

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self.batches)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(batches())


def test_a_normalize_is_found_however_deep() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = {"last": [Compose([RandomApply([Normalize(*IMAGENET)])])]}

    for transform in (
        Own(),
        RandomChoice([Resize(8), Compose([Resize(8), Normalize(*IMAGENET)])]),
        v1.Compose([v1.Lambda(partial(Normalize(*IMAGENET))), v1.Resize(8)]),
        v1.Compose([v1.Compose([v1.Normalize(*IMAGENET)])]),
        nn.Sequential(nn.Identity(), nn.ModuleList([Normalize(*IMAGENET)])),
    ):
        assert find_normalize(transform), transform
    assert not find_normalize(Compose([Resize(8), RandomApply([nn.Identity()])]))
    assert not find_normalize(None)


@pytest.mark.parametrize("name", MODELS)
def test_normalized_images_are_refused_where_they_come_from(name: str, tile_root: Path, tmp_path: Path) -> None:
    model, normalize = small_model(name), RandomApply([Compose([Normalize(*IMAGENET)])], p=0.5)
    for place in ("augmentations", "train_augmentations", "val_augmentations", "test_augmentations"):
        data = Folder(**tile_arguments(tile_root), **{place: normalize})
        stage = "train" if place == "augmentations" else place.partition("_")[0]
        with pytest.raises(ValueError, match=rf"the {stage}_augmentations of the data module .* {name} .* in \[0, 1\]"):
            small_engine(tmp_path).fit(model, datamodule=data)
    for use in ("fit", "predict"):
        engine = small_engine(tmp_path, max_steps=1)
        loader = Loader(-2, 2)
        given = {"train_dataloaders": loader} if use == "fit" else {"dataloaders": [loader]}
        what = "training" if use == "fit" else "prediction"
        with pytest.raises(ValueError, match=f"first images of the {what} have values from -2.* to 2"):
            getattr(engine, use)(small_model(name, pre_processor=False), **given)
    assert model.global_step == 0


def test_a_resize_may_overstep_a_little(tile_root: Path, tmp_path: Path) -> None:
    model = small_model("FractalAD", pre_processor=False)
    sharp = Resize((64, 64), InterpolationMode.BICUBIC)
    data = Folder(**tile_arguments(tile_root), augmentations=sharp)
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(model, train_dataloaders=Loader(-0.05, 1.05), val_dataloaders=Loader(-0.05, 1.05))
    engine.test(model, datamodule=data)


@pytest.mark.parametrize("name", MODELS)
def test_every_loader_that_lightning_takes(name: str, tmp_path: Path) -> None:
    model = small_model(name, pre_processor=False, **({"cosine_decay": True} if name == "FractalAD" else {}))
    streams = [DataLoader(Stream(), batch_size=None), Loader(), CombinedLoader([Loader()], "sequential")]
    for stream in streams:
        train = stream if not isinstance(stream, CombinedLoader) else Loader()
        engine = small_engine(tmp_path, max_steps=2)
        engine.fit(model, train_dataloaders=train, val_dataloaders=stream)
        assert model.training_steps == 2
        engine.validate(model, dataloaders=stream)  # anomalib's timer asks for the length of what is tested on
        assert len(engine.predict(model, dataloaders=[Loader()])) == 2
    engine = small_engine(tmp_path, max_epochs=1)
    if name == "ADPS":
        engine.fit(model, train_dataloaders=streams[0])
        assert math.isinf(model.training_steps)
        assert engine.trainer.optimizers[0].param_groups[0]["lr"] == model.learning_rate
    else:
        with pytest.raises(ValueError, match="end of training"):
            engine.fit(model, train_dataloaders=streams[0])


def copy_of(tile_root: Path, root: Path) -> Path:
    return Path(shutil.copytree(tile_root, root / "copy"))


def test_masks_that_cannot_be_right_are_named_with_their_images(tile_root: Path, tmp_path: Path) -> None:
    root = copy_of(tile_root, tmp_path)
    image, mask = root / "test/blot/001.png", root / "ground_truth/blot/001.png"
    save(np.zeros((64, 64)), mask)
    for use in ("fit", "validate", "test"):
        with pytest.raises(UnreadableImageError, match=rf"^1 .*\n  {mask} marks nothing, while its image, {image},"):
            getattr(small_engine(tmp_path), use)(model=small_model("FractalAD"), datamodule=make_tiles(root))

    data = make_tiles(root)
    data.setup()
    data.test_data.samples.loc[lambda samples: samples.mask_path == str(mask), "mask_path"] = ""
    with pytest.raises(UnreadableImageError, match=rf"{image} is anomalous and has no mask, while other"):
        check_images([data.test_data])
    data = make_tiles(root)
    data.setup()
    mask.unlink()
    with pytest.raises(UnreadableImageError, match=rf"{mask}, the mask of {image}, does not exist"):
        check_images([data.test_data])

    (root / "ground_truth/blot/002.png").rename(root / "ground_truth/blot/9.png")
    for use in ("fit", "test"):
        with pytest.raises(UnreadableImageError) as error:
            getattr(small_engine(tmp_path), use)(small_model("FractalAD"), datamodule=make_tiles(root))
        assert f"{image} is anomalous and has no mask in" in str(error.value)
        assert f"{root / 'ground_truth/blot/9.png'} is a mask without an image" in str(error.value)


def test_images_are_checked_as_far_as_asked_for_and_once(
    tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(tile_root, tmp_path)
    data = make_tiles(root)
    data.setup()
    decoded: list[str] = []
    load = Image.Image.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image.filename) or load(image))

    def check(mode: Any) -> list[str]:
        decoded.clear()
        check_images([data.train_data], mode)
        return sorted(set(decoded))

    assert (len(check("full")), len(check("auto")), check("headers"), check("off")) == (8, 8, [], [])
    monkeypatch.setattr(image_check, "_AUTO_PIXELS", 4 * 64 * 64)
    assert 1 <= len(check("auto")) <= 4
    monkeypatch.undo()

    broken = root / "train/good/001.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-100])
    for mode in ("full", "headers"):
        with pytest.raises(UnreadableImageError, match=rf"{broken} is truncated"):
            check_images([data.train_data], mode)
    check_images([data.train_data], "off")

    broken.write_bytes(whole)
    checked = []
    monkeypatch.setattr(image_check, "_problems", lambda items, mode: checked.append((len(items), mode)) or {})
    for arguments in ({}, {"callbacks": [ImageCheck("headers")]}):
        engine = small_engine(tmp_path, max_epochs=1, **arguments)
        engine.fit(small_model("FractalAD"), datamodule=make_tiles(root))
        engine.test(engine.model, datamodule=make_tiles(root))
    os.utime(broken)
    resumed = small_engine(tmp_path, max_epochs=1)
    resumed.fit(small_model("FractalAD"), datamodule=make_tiles(root), ckpt_path=engine.best_model_path)
    monkeypatch.setenv("ANOMALIB_FRACTALAD_IMAGE_CHECK", "full")
    engine.test(small_model("FractalAD"), datamodule=make_tiles(root), ckpt_path=engine.best_model_path)
    small_engine(tmp_path).test(small_model("FractalAD"), datamodule=make_tiles(root))
    assert checked == [(16, "auto"), (0, "headers"), (16, "headers"), (0, "headers"), (0, "headers"), (8, "full")]
    monkeypatch.setenv("ANOMALIB_FRACTALAD_IMAGE_CHECK", "some")
    with pytest.raises(ValueError, match="is 'some'; use one of auto, full, headers, off"):
        ImageCheck()


def imported(path: Path, module: list[str]) -> Iterator[str]:
    """What a file of the package imports when it is loaded."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module[:-1]
            parents = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def test_networks_import_no_lightning() -> None:
    package = Path(anomalib_fractalad.__file__).parent
    networks = sorted((package / "models").glob("*/torch_model.py"))
    waiting = [f"anomalib_fractalad.models.{network.parent.name}.torch_model" for network in networks]
    seen: set[Path] = set()
    while waiting:
        module = waiting.pop().split(".")
        for count in range(1, len(module) + 1):  # packages are loaded before what is in them
            path = package.joinpath(*module[1:count])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if path.is_file() and path not in seen:
                seen.add(path)
                names = set(imported(path, module[:count]))
                assert not {"lightning", "pytorch_lightning"} & {name.partition(".")[0] for name in names}, path
                waiting += [name for name in names if name.startswith("anomalib_fractalad.")]
    assert len(networks) == len(MODELS)
    assert package / "models/components/backbone.py" in seen
