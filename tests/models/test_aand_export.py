# SPDX-License-Identifier: Apache-2.0
"""AAND's score is the same in Lightning, TorchInferencer, ONNX Runtime and OpenVINO, with each kind of student."""

from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from anomalib.pre_processing import PreProcessor
from conftest import assert_one_score_everywhere, assert_same_prediction, in_onnx_runtime, make_tiles
from lightning import seed_everything
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.torch_model import Alignment


def trained(backbone: str, alignment: Alignment, root: Path, tile_root: Path) -> Engine:
    seed_everything(0)
    model = AAND(
        backbone=backbone,
        alignment=alignment,
        fine_embedding=alignment == "centers",
        pre_trained=False,
        pre_processor=PreProcessor(Resize((64, 64), antialias=True)),
        visualizer=False,
    )
    engine = Engine(
        accelerator="cpu",
        max_epochs=4,
        check_val_every_n_epoch=4,
        enable_progress_bar=False,
        default_root_dir=root,
    )
    engine.fit(model, datamodule=make_tiles(tile_root))
    return engine


@pytest.mark.parametrize(
    ("backbone", "alignment", "size", "fixed"),
    [
        ("test_resnet", "centers", (64, 64), True),
        ("resnet18", "corners", (100, 150), False),
    ],
)
def test_one_score_everywhere(
    backbone: str,
    alignment: Alignment,
    tile_root: Path,
    size: tuple[int, int],
    fixed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    engine = trained(backbone, alignment, tmp_path, tile_root)
    image = tmp_path / "image.png"
    save_image(torch.rand(1, 3, *size), image)
    assert_one_score_everywhere(engine, image, tmp_path, capfd, size if fixed else None)


def test_an_export_without_a_pre_processor_takes_the_size_it_is_made_for(tmp_path: Path) -> None:
    settings = {"pre_trained": False, "pre_processor": False, "visualizer": False}
    model = AAND(backbone="test_resnet", alignment="centers", **settings).eval()
    with pytest.raises(ValueError, match="give input_size"):
        model.to_onnx(tmp_path)
    file = model.to_onnx(tmp_path, input_size=(70, 53))
    images = torch.rand(3, 3, 70, 53)
    with torch.no_grad():
        reference = model(images)
    assert_same_prediction(in_onnx_runtime(file, images), reference)
