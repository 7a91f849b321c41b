# SPDX-License-Identifier: Apache-2.0
"""A region of interest: what lies outside is neither trained on nor scored nor shown."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, PredictDataset
from anomalib.data.utils.tiler import Tiler
from anomalib.deploy import TorchInferencer
from conftest import SIZE, in_onnx_runtime, make_tiles, one_program, save, small_engine, small_model, tile_arguments
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

import anomalib_fractalad
from anomalib_fractalad.export.module import ExportModule
from anomalib_fractalad.image_files import UnreadableImageError
from anomalib_fractalad.inspection import Inspector
from anomalib_fractalad.models.components import ImageScore, RegionOfInterest
from anomalib_fractalad.models.components.region import OUTSIDE, check_roi, read_roi, record
from anomalib_fractalad.models.fractalmemory.gathering import Gathering
from anomalib_fractalad.models.fractalmemory.stages import StagePlan
from anomalib_fractalad.registration import MODELS
from anomalib_fractalad.transforms import FractalAnomalyGenerator

INSIDE = np.zeros((SIZE, SIZE), dtype=bool)
INSIDE[10:54, 8:40] = True
CONVERTED = ("ADPS", "FractalMemory")  # all models have the same region; ADPS alone scores the map that it shows


@pytest.fixture(scope="module")
def roi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("roi") / "roi.png"
    save(255 * INSIDE, file)
    return file


def with_other_outside(images: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.from_numpy(INSIDE), images, torch.rand_like(images))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outside_counts_for_nothing(
    name: str, roi: Path, tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, prediction, checkpoints and exported networks; the network sees images enlarged."""
    size = (128, 128)  # which ADPS can divide
    pre_processor = getattr(anomalib_fractalad, name).configure_pre_processor(size)
    mask = tmp_path / "roi.png"
    mask.write_bytes(roi.read_bytes())
    distance_alone = {"head": False, "score": "max"} if name == "FractalMemory" else {}
    model = small_model(name, roi=mask, pre_processor=pre_processor, **distance_alone)
    engine = small_engine(tmp_path, max_epochs=2)
    engine.fit(model, datamodule=make_tiles(tile_root))
    images = torch.rand(2, 3, SIZE, SIZE)
    model.eval()
    with torch.no_grad():
        expected, other = model(images), model(with_other_outside(images))
    inside = model.model.region.inside
    assert 0.2 < model.model.region.share < INSIDE.mean()
    assert torch.equal(expected.anomaly_map, other.anomaly_map)
    assert torch.equal(expected.pred_score, other.pred_score)
    outside_values = expected.anomaly_map[~inside.expand_as(expected.anomaly_map)]
    assert (outside_values == expected.anomaly_map.min()).all()
    assert not expected.pred_mask[~inside.expand_as(expected.pred_mask)].any()
    # Raw scores are those of the pixels inside.
    with monkeypatch.context() as patch:
        if name == "FractalMemory":  # whose scores are those of the map without saturation
            patch.setattr(model.model.saturation, "strength", 0)
        raw = model.model(pre_processor.transform(images))
    pixels = model.model.region.pixels(raw.anomaly_map)
    if name != "ADPS":  # which scores the smoothed map
        reduced = pixels.mean(1) if name == "FractalAD" else pixels.amax(1)
        torch.testing.assert_close(raw.pred_score, reduced)
    # Defects outside are no ground truth.
    batch = ImageBatch(
        image=torch.rand(1, 3, *size), gt_label=torch.ones(1, dtype=torch.bool), gt_mask=torch.ones(1, *size)
    )
    assert torch.equal(model.validation_step(batch).gt_mask[0] > 0, inside[0, 0])

    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    mask.unlink()
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt").eval()
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(model.to_torch(tmp_path), device="cpu")
    inspector = None
    if name in CONVERTED:
        with one_program():
            onnx = in_onnx_runtime(model.to_onnx(tmp_path), images)
            np.testing.assert_allclose(onnx.anomaly_map, expected.anomaly_map, atol=1e-3)
            (tmp_path / "part.json").write_text('{"network": "model.xml", "roi": {"size": [64, 64]}}')
            xml = model.to_openvino(tmp_path)
        for file in (xml, xml.with_suffix(".bin")):
            file.replace(tmp_path / file.name)
        inspector = Inspector(tmp_path)
    for i in range(2):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
        image = Image.fromarray((255 * images[i]).byte().permute(1, 2, 0).numpy())
        image.save(tmp_path / f"{i}.png")
        rounded = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            reference = loaded(rounded)
            assert torch.equal(reference.anomaly_map, model(rounded).anomaly_map)
        raw_scores = model.post_processor.image_max - model.post_processor.image_min
        tolerance = 1e-3 if raw_scores > 1e-3 else 1.0  # a network that learned nothing gives one score to all
        if inspector is not None:
            found = inspector.predict(image)
            np.testing.assert_allclose(found["anomaly_map"], reference.anomaly_map[0, 0], atol=1e-3)
            assert found["pred_score"] == pytest.approx(float(reference.pred_score), abs=tolerance)
        torch_map = torch.as_tensor(inferencer.predict(tmp_path / f"{i}.png").anomaly_map).squeeze()
        torch.testing.assert_close(torch_map, reference.anomaly_map[0, 0])


def test_the_memory_gathers_nothing_from_outside(roi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("FractalMemory", roi=roi)
    monkeypatch.setattr(type(model), "trainer", SimpleNamespace(global_step=0, global_rank=0))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model.plan = StagePlan(5, 0)
    images = torch.rand(4, 3, SIZE, SIZE)
    gathered = []
    for variant in (images, with_other_outside(images)):
        torch.manual_seed(1)
        model._gathering = Gathering(model.model.teacher.channels, 40, model.device)
        model.training_step(ImageBatch(image=variant, gt_label=torch.zeros(4, dtype=torch.bool)))
        gathered.append([*model._gathering.moments.buffers(), *model._gathering.reservoir.buffers()])
    assert gathered[0][0].min() > 0
    for one, other in zip(*gathered, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["FractalAD", "ADPS", "AAND"])
def test_training_sees_nothing_outside(name: str, roi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies outside, the loss is the same, and so are the anomalies, which lie inside; also on tiles."""
    model = small_model(name, roi=roi)
    seen: list[torch.Tensor] = []
    entrance = {"FractalAD": "segment", "ADPS": "compare", "AAND": "compare"}[name]
    original = getattr(model.model, entrance)

    def spy(images: torch.Tensor, *masks: torch.Tensor) -> Any:
        seen.extend([images, *masks])
        return original(images, *masks)

    monkeypatch.setattr(model.model, entrance, spy)
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    monkeypatch.setattr(model, "log_dict", lambda *_, **__: None)
    if name == "AAND":
        monkeypatch.setattr(type(model), "stage", anomalib_fractalad.models.aand.stages.Stage.AMPLIFICATION)
        monkeypatch.setattr(model, "nothing_of_idle_weights", lambda: 0.0)
    images = torch.rand(8, 3, SIZE, SIZE)
    losses = []
    for variant in (images, with_other_outside(images)):
        torch.manual_seed(1)
        losses.append(model.training_step(ImageBatch(image=variant, gt_label=torch.zeros(8, dtype=torch.bool))))
    assert torch.equal(*losses)
    outside = ~torch.from_numpy(INSIDE)
    assert (seen[0][..., outside] == OUTSIDE).all()
    if name == "AAND":
        assert seen[1].any()
        assert not seen[1][..., outside].any()
    model.model.tiler = Tiler(32, 32)
    views, inside = model.training_views(ImageBatch(image=images, gt_label=torch.zeros(8, dtype=torch.bool)))
    assert views.shape == (32, 3, 32, 32)
    assert torch.equal(inside, (views != OUTSIDE).any(1, keepdim=True))


def test_fractal_anomalies_stay_inside() -> None:
    images = torch.rand(40, 3, SIZE, SIZE)
    region = torch.from_numpy(INSIDE).expand(40, 1, -1, -1)
    for generator in (FractalAnomalyGenerator(), FractalAnomalyGenerator(object_mode=True)):
        normal, anomalous, masks = generator.augment(images, region)
        assert (masks.flatten(1).amax(1) == 1).float().mean() > 0.9
        assert not masks[~region].any()
        everywhere = (~region).expand_as(images)
        assert torch.equal(normal[everywhere], images[everywhere])
        assert torch.equal(anomalous[everywhere], images[everywhere])
        unchanged = (masks == 0).expand_as(images)
        assert torch.equal(normal[unchanged], anomalous[unchanged])


@pytest.mark.parametrize(("reduction", "share"), [("mean", 1.0), ("max", 1.0), ("top", 0.01), ("top", 1.0)])
def test_scores_of_pixels_inside(reduction: Any, share: float) -> None:
    region = RegionOfInterest(torch.from_numpy(INSIDE))
    maps = torch.rand(3, 1, SIZE, SIZE)
    score, alone = ImageScore(reduction, share), maps[:, :, 10:54, 8:40]
    torch.testing.assert_close(score(maps, region), score(alone))


def test_the_region_is_transformed_like_images() -> None:
    wide = torch.zeros(60, 120, dtype=torch.bool)
    wide[:, 30:] = True
    region = RegionOfInterest(wide, Resize((32, 32), antialias=True))
    assert region.inside[0, 0].all(0).tolist() == [False] * 9 + [True] * 23  # column 8 also sees what is outside
    assert RegionOfInterest(wide, Resize(30, antialias=True)).inside.shape == (1, 1, 30, 60)
    with pytest.raises(ValueError, match=r"an image of 50x40 comes to the network, and the region .* of 32x32"):
        region.hide(torch.rand(1, 3, 40, 50))


def test_regions_that_cannot_be_right(roi: Path, tile_root: Path, tmp_path: Path) -> None:
    save(np.zeros((SIZE, SIZE)), tmp_path / "black.png")
    save(np.eye(SIZE) * 255, tmp_path / "line.png")
    save(np.full((SIZE, 2 * SIZE), 255), tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("This is a text.")
    for name, error, message in (
        ("black.png", ValueError, "black everywhere"),
        ("line.png", ValueError, "nothing is left of the region of interest"),
        ("text.png", UnreadableImageError, "cannot be read: .*text.png is no image"),
        ("missing.png", FileNotFoundError, "is no file; give a mask image"),
    ):
        kind = small_model("FractalAD").configure_pre_processor((32, 32))
        with pytest.raises(error, match=message):
            small_model("FractalAD", roi=tmp_path / name, pre_processor=kind)
    with pytest.raises(ValueError, match="must have the same proportions"):
        check_roi(tmp_path / "wide.png", [(SIZE, SIZE)])
    check_roi(roi, [(SIZE, SIZE), (3 * SIZE, 3 * SIZE + 1)])
    assert torch.equal(read_roi(record(roi)), torch.from_numpy(INSIDE))
    model = small_model("FractalAD", roi=tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"000\.png does not fit: .*128x64 pixels, and an image 64x64"):
        small_engine(tmp_path, max_epochs=1).fit(model, datamodule=make_tiles(tile_root))
    loader = DataLoader(PredictDataset(tile_root / "test/good"), collate_fn=PredictDataset(tile_root).collate_fn)
    with pytest.raises(ValueError, match="does not fit"):
        small_engine(tmp_path).predict(model, dataloaders=loader)


def test_the_program_and_engines_take_it(
    roi: Path, tile_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [text for key, value in tile_arguments(tile_root).items() for text in (f"--data.{key}", str(value))]
    program = AnomalibCLI(
        [
            *("train", "--model", "FractalAD", "--model.roi", str(roi), "--data", "Folder", *data),
            *("--model.pre_trained", "false", "--model.backbone", "test_resnet", "--default_root_dir", str(tmp_path)),
        ],
        run=False,
    )
    assert torch.equal(read_roi(program.model.roi), torch.from_numpy(INSIDE))
    assert program.model.model.region.inside.shape == (1, 1, 256, 256)
    # A model without a region takes that of its checkpoint.
    engine = small_engine(tmp_path, max_epochs=1)
    engine.fit(small_model("FractalAD", roi=roi), datamodule=make_tiles(tile_root))
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = small_model("FractalAD")
    small_engine(tmp_path).test(other, datamodule=make_tiles(tile_root), ckpt_path=tmp_path / "model.ckpt")
    assert other.model.region.pixel_count == INSIDE.sum()
    # Without a pre-processor, images have the region's size.
    sizes: list[Any] = []
    monkeypatch.setattr(ExportModule, "to_onnx", lambda _, *arguments: sizes.append(arguments[2]))
    whole = small_model("FractalAD", roi=roi, pre_processor=False)
    whole.to_onnx(tmp_path)
    other.to_onnx(tmp_path)
    assert sizes == [(SIZE, SIZE), None]
    with pytest.raises(ValueError, match="same proportions"):
        whole.before_export((SIZE, 2 * SIZE))
    with pytest.raises(ValueError, match="an image of 32x32 comes to the network"):
        whole.before_export((32, 32))
