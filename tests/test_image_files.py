# SPDX-License-Identifier: Apache-2.0
"""Images that are not like the others: read, trained on, predicted, and given to exported models."""

import importlib.util
import logging
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.data.datasets.video import AvenueDataset
from anomalib.data.utils import get_image_filenames
from conftest import (
    ODD_FOLDER,
    SIZE,
    make_odd_images,
    save,
    small_engine,
)
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Pad

import anomalib_fractalad
from anomalib_fractalad.image_files import UnreadableImageError, read_image, read_mask
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.repairs.data import repair
from anomalib_fractalad.repairs.image_paths import every_script
from anomalib_fractalad.training.image_check import check_images, leave_out_unreadable

Odd = tuple[list[Path], dict[Path, str]]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Odd:
    return make_odd_images(tmp_path_factory.mktemp("images") / ODD_FOLDER, large=True)


@pytest.fixture(scope="module")
def good(odd: Odd) -> Path:
    """A folder of those that can be read."""
    folder = odd[0][0].parents[1] / "good 良い"
    folder.mkdir()
    for path in odd[0]:
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def anomalibs_own() -> ModuleType:
    """Anomalib's functions, untouched."""
    spec = importlib.util.find_spec("anomalib.data.utils.image")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.read_image is not read_image
    return module


def model_of(name: str) -> Any:
    kind = getattr(anomalib_fractalad, name)
    extra = {"ADPS": {"patches": 2}, "FractalMemory": {"head": True}}.get(name, {})
    size = kind.configure_pre_processor((SIZE, SIZE))
    return kind(backbone="test_resnet", pre_trained=False, visualizer=False, pre_processor=size, **extra)


def folder_of(normal: Path, **arguments: Any) -> Folder:
    defaults = {"train_batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder(name="odd", normal_dir=normal, **{**defaults, **arguments})


# Reading


def test_images_of_8_bits_are_read_as_anomalib_reads_them(odd: Odd, anomalibs_own: ModuleType) -> None:
    for path in odd[0]:
        if "16 bits" not in path.name:
            for as_tensor in (False, True):
                ours, theirs = read_image(path, as_tensor), anomalibs_own.read_image(path, as_tensor)
                assert (type(ours), ours.dtype) == (type(theirs), theirs.dtype)
                assert np.array_equal(ours, theirs), path
                ours, theirs = read_mask(path, as_tensor), anomalibs_own.read_mask(path, as_tensor)
                assert (type(ours), ours.dtype) == (type(theirs), theirs.dtype)
                assert np.array_equal(np.squeeze(ours), np.squeeze(theirs)), path


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
def test_gray_levels_of_16_bits_are_divided_by_256(ending: str, tmp_path: Path) -> None:
    deep, color = tmp_path / f"deep{ending}", tmp_path / "color.png"
    levels = np.array([[0, 255, 256, 4095, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(deep)
    cv2.imwrite(str(color), np.stack([levels] * 3, axis=-1))
    expected = np.array([[0, 0, 1, 15, 128, 255]]) / 255
    assert np.array_equal(read_image(deep), np.stack([expected] * 3, axis=-1))
    assert np.array_equal(read_image(deep), read_image(color))
    assert torch.allclose(read_image(deep, as_tensor=True), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(("kind", "levels"), [(np.float32, [0, 0.5, 255]), (np.int32, [0, 1, 255]), (np.float32, [0])])
def test_gray_levels_of_32_bits_up_to_255_stay(
    kind: type,
    levels: list[float],
    tmp_path: Path,
    anomalibs_own: ModuleType,
) -> None:
    Image.fromarray(np.array([levels], dtype=kind)).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif"), anomalibs_own.read_image(tmp_path / "a.tif"))


@pytest.mark.parametrize(
    ("kind", "levels"),
    [(np.float32, [0, 1]), (np.float32, [0, 256]), (np.float32, [-1, 9]), (np.float32, [0, np.nan]), (np.int32, [999])],
)
def test_gray_levels_of_32_bits_that_do_not_fit_are_refused(kind: type, levels: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array([levels], dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match=r"a\.tif has gray levels of 32 bits from .* Save it with 8 or 16"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    "levels",
    [
        np.array([[0, 1], [0, 1]], dtype=np.uint8),
        np.array([[0, 7], [0, 200]], dtype=np.uint8),
        np.array([[0, 1], [0, 65535]], dtype=np.uint16),
        np.array([[False, True], [False, True]]),
    ],
)
def test_every_level_of_a_mask_above_0_is_a_defect(levels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(levels).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", as_tensor=True)
    assert torch.equal(mask, torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8))


def test_masks_of_one_row_keep_both_dimensions(tmp_path: Path) -> None:
    Image.new("L", (5, 1)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", as_tensor=True).shape == (1, 5)


def test_errors_name_the_file_and_what_is_wrong(odd: Odd) -> None:
    for path, reason in odd[1].items():
        for read in (read_image, read_mask):
            with pytest.raises(UnreadableImageError) as error:
                read(path)
            assert str(error.value).startswith(f"{path} is ")
            assert reason in str(error.value)


def test_a_decoder_that_fails_otherwise_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(np.zeros((4, 4)), tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: 1 // 0)
    with pytest.raises(UnreadableImageError, match=r"a\.png cannot be decoded \(ZeroDivisionError: .* Replace"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: bytearray(1 << 62))
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_missing_files_keep_their_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png")


def test_paths_may_hold_letters_of_any_script_but_no_control_characters(odd: Odd, tmp_path: Path) -> None:
    with every_script():
        assert len(get_image_filenames(odd[0][0].parent)) == len(odd[0]) + len(odd[1])
    (tmp_path / "a\nb").mkdir()
    with every_script(), pytest.raises(ValueError, match="non-printable"):
        get_image_filenames(tmp_path / "a\nb")


# Training


def save_black_images(root: Path, count: int) -> None:
    for folder in ("good", "defect", "mask"):
        for i in range(count):
            save(np.zeros((8, 16)), root / folder / f"{i}.png")


@pytest.mark.parametrize("name", MODELS)
def test_training_names_all_unreadable_images_before_it_begins(name: str, odd: Odd, tmp_path: Path) -> None:
    model = model_of(name)
    with pytest.raises(UnreadableImageError, match=f"^{len(odd[1])} image") as error:
        small_engine(tmp_path, max_epochs=1).fit(model, datamodule=folder_of(odd[0][0].parent))
    assert model.global_step == 0
    for path, reason in odd[1].items():
        assert any(str(path) in line and reason in line for line in str(error.value).splitlines())


def test_training_checks_test_images_and_masks(tmp_path: Path) -> None:
    save_black_images(tmp_path, 2)
    (tmp_path / "defect/0.png").write_bytes(b"")
    (tmp_path / "mask/1.png").write_bytes(b"text")
    data = folder_of(
        tmp_path / "good",
        abnormal_dir=tmp_path / "defect",
        mask_dir=tmp_path / "mask",
        val_split_mode="from_train",
    )
    with pytest.raises(UnreadableImageError, match=r"^2 image") as error:
        small_engine(tmp_path, max_epochs=1).fit(model_of("FractalAD"), datamodule=data)
    assert f"{tmp_path / 'defect/0.png'} is empty" in str(error.value)
    assert f"{tmp_path / 'mask/1.png'} is no image" in str(error.value)


def test_of_many_unreadable_images_ten_are_named(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.png").touch()
    with pytest.raises(UnreadableImageError, match=r"and 2 more$") as error:
        check_images([PredictDataset(tmp_path)])
    assert str(error.value).count("is empty") == 10
    check_images([None, [1, 2, 3], object.__new__(AvenueDataset)])


@pytest.mark.parametrize(
    ("size", "fits"),
    [((8, 16), True), ((4, 8), True), ((5, 9), True), ((80, 160), True), ((16, 8), False), ((8, 8), 0)],
)
def test_masks_have_their_images_proportions(size: tuple[int, int], fits: bool, tmp_path: Path) -> None:
    save(np.zeros((8, 16)), tmp_path / "good/0.png")
    save(np.zeros((8, 16)), tmp_path / "defect/0.png")
    save(np.ones(size), tmp_path / "mask/0.png")
    good = tmp_path / "good"
    data = folder_of(good, normal_test_dir=good, abnormal_dir=tmp_path / "defect", mask_dir=tmp_path / "mask")
    data.setup()
    assert repair([data.test_data]) == [data.test_data]
    if fits:
        check_images([data.test_data])
        (batch,) = data.test_dataloader()
        assert batch.gt_mask.shape == (2, 8, 16)
        assert batch.gt_mask.flatten(1).float().mean(dim=1).tolist() == batch.gt_label.tolist()
        data.test_data.augmentations = Pad(8)
        (batch,) = data.test_dataloader()
        assert batch.image.shape[-2:] == (24, 32)
        assert batch.gt_mask.flatten(1).float().mean(dim=1).tolist() == pytest.approx((batch.gt_label / 6).tolist())
        return
    with pytest.raises(UnreadableImageError, match=rf"mask.0\.png is a mask of {size[1]}x{size[0]} .* 16x8, .*defect"):
        check_images([data.test_data])
    assert leave_out_unreadable([data.test_data]) == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image", ["black.png", "white.png", "one pixel.png"])
def test_training_on_one_image(name: str, image: str, odd: Odd, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(odd[0][0].with_name(image), tmp_path / "one")
    model = model_of(name)
    engine = small_engine(tmp_path, max_epochs=2)
    engine.fit(model, datamodule=folder_of(tmp_path / "one"))
    assert model.trainer.global_step == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    (prediction,) = engine.predict(model, data_path=tmp_path / "one")
    assert prediction.anomaly_map.isfinite().all()
    assert prediction.pred_score.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_without_normal_test_images(name: str, tile_root: Path, tmp_path: Path) -> None:
    data = folder_of(
        tile_root / "train/good",
        abnormal_dir=tile_root / "test/blot",
        mask_dir=tile_root / "ground_truth/blot",
        test_split_mode="none",
    )
    model, engine = model_of(name), small_engine(tmp_path, max_epochs=2)
    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data)
    assert np.isfinite(metrics["pixel_AUROC"])


def test_empty_folders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "empty 空"
    folder.mkdir()
    with pytest.raises(RuntimeError, match=r"Found 0 .*NORMAL.* images in .*empty 空"):
        small_engine(tmp_path).fit(model_of("FractalAD"), datamodule=folder_of(folder))
    with pytest.raises(ValueError, match=r"Found 0 images in .*empty 空"):
        small_engine(tmp_path).predict(model_of("FractalAD"), data_path=folder)


# Prediction; what exported models make of these images is in models/test_one_score.py


@pytest.mark.parametrize("name", MODELS)
def test_odd_images_are_predicted_and_unreadable_ones_left_out(
    name: str,
    odd: Odd,
    good: Path,
    tile_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = tmp_path / ODD_FOLDER
    model, engine = model_of(name), small_engine(root, max_epochs=1)
    blots = {"abnormal_dir": tile_root / "test/blot", "mask_dir": tile_root / "ground_truth/blot"}
    engine.fit(model, datamodule=folder_of(good, **blots))
    with caplog.at_level(logging.WARNING):
        predictions = {Path(p.image_path[0]): p for p in engine.predict(model, data_path=odd[0][0].parent)}
    assert list(predictions) == sorted(odd[0])
    assert f"{len(odd[1])} image(s) left out of the prediction" in caplog.text
    assert all(str(path) in caplog.text for path in odd[1])
    assert all(prediction.anomaly_map.isfinite().all() for prediction in predictions.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_loader_close_ranks(workers: int, tmp_path: Path) -> None:
    for i in range(5):
        save(np.full((8, 8), 20 * i), tmp_path / f"{i}.png")
    for i in (0, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    data = PredictDataset(tmp_path)
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate_fn, num_workers=workers)
    predictions = small_engine(tmp_path).predict(model_of("FractalAD"), dataloaders=loader)
    assert [[Path(path).stem for path in batch.image_path] for batch in predictions] == [["1", "2"], ["4"]]


def test_prediction_of_a_data_module_leaves_out_images_and_masks_that_cannot_be_read(tmp_path: Path) -> None:
    save_black_images(tmp_path, 4)
    (tmp_path / "defect/0.png").write_bytes(b"")
    (tmp_path / "mask/2.png").write_bytes(b"")
    data = folder_of(tmp_path / "good", abnormal_dir=tmp_path / "defect", mask_dir=tmp_path / "mask")
    (batch,) = small_engine(tmp_path).predict(model_of("FractalAD"), datamodule=data)
    assert [Path(path).stem for path in batch.image_path if "defect" in path] == ["1", "3"]


def test_prediction_without_a_readable_image_names_them(odd: Odd, tmp_path: Path) -> None:
    for path in odd[1]:
        shutil.copy(path, tmp_path)
    with pytest.raises(UnreadableImageError, match=f"^{len(odd[1])} image") as error:
        small_engine(tmp_path).predict(model_of("FractalAD"), data_path=tmp_path)
    assert all(str(tmp_path / path.name) in str(error.value) for path in odd[1])


def test_heat_maps_are_drawn_on_images_of_16_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 128 << 8, dtype=np.uint16)).save(tmp_path / "deep.png")
    model = anomalib_fractalad.FractalAD(backbone="test_resnet", pre_trained=False)
    small_engine(tmp_path / "results").predict(model, data_path=tmp_path / "deep.png")
    (drawn,) = (tmp_path / "results").rglob("deep.png")
    assert np.abs(np.asarray(Image.open(drawn).convert("L"))[100:, :200].astype(int) - 128).max() <= 1
