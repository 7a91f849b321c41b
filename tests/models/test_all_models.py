# SPDX-License-Identifier: Apache-2.0
"""What holds for every model of the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from conftest import assert_same_weights, make_tiles, small_engine, small_model
from lightning import seed_everything

from anomalib_fractalad.models.aand import loss as aand
from anomalib_fractalad.models.adps import loss as adps
from anomalib_fractalad.models.components import cosine_distance
from anomalib_fractalad.models.fractalad import loss as fractalad
from anomalib_fractalad.registration import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_workers_does_not_change_the_result(name: str, tile_root: Path, tmp_path: Path) -> None:
    def trained(workers: int) -> Any:
        seed_everything(1)
        model = small_model(name)
        small_engine(tmp_path, max_epochs=2).fit(model, datamodule=make_tiles(tile_root, num_workers=workers))
        return model

    alone = trained(0)
    for workers in (0, 1, 2):
        assert_same_weights(alone, trained(workers))


@pytest.mark.parametrize(
    ("name", "part"),
    [("FractalAD", "bce"), ("ADPS", "distillation"), ("AAND", "focal"), ("FractalMemory", "focal")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_training(
    name: str,
    part: str,
    value: float,
    tiles: Folder,
    tmp_path: Path,
) -> None:
    model = small_model(name)
    for parameter in model.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(value)
    epoch = int(name == "FractalMemory")  # its first has no loss
    where = f"epoch {epoch}, step {2 * epoch}"
    message = rf"the {part} loss of {name} is (nan|inf) in {where}, on the images .*good.*\.png.* lower the"
    with pytest.raises(FloatingPointError, match=message):
        small_engine(tmp_path, max_epochs=2).fit(model, datamodule=tiles)


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_mixed_precision_are_numbers(name: str, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    small_engine(tmp_path, max_epochs=2, precision="bf16-mixed").fit(model, datamodule=tiles)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.trainer.callback_metrics["train_loss"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_losses_are_those_of_float32(dtype: torch.dtype) -> None:
    maps = [300 * torch.randn(2, 16, 8, 8) for _ in range(2)]  # their squared norm overflows float16
    logits, mask = 30 * torch.randn(2, 2, 8, 8), torch.rand(2, 1, 8, 8) > 0.5
    inputs = [tensor.to(dtype) for tensor in (*maps, logits)]

    def losses(teacher: torch.Tensor, student: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        positions = [features.movedim(1, -1).flatten(0, 2) for features in (teacher, student)]
        distances = [cosine_distance(teacher, student)]
        return {
            **fractalad.SegmentationLoss()(logits[:, :1], mask),
            "FractalAD distillation": fractalad.DistillationLoss()([teacher], [student]),
            "ADPS distillation": adps.AsymmetricDistillationLoss()(distances, mask.float()),
            "ADPS segmentation": adps.FocalLoss()(logits, mask),
            "AAND plain": aand.PlainDistillationLoss()([teacher], [student]),
            "AAND hard": aand.HardDistillationLoss()([teacher], [student]),
            "AAND gate": aand.GateLoss()(logits[:, :1], mask),
            "AAND amplification": aand.AmplificationLoss()(positions[0], positions[1], positions[1].roll(1, 0)),
        }

    expected = losses(*(tensor.float() for tensor in inputs))
    with torch.autocast("cpu", dtype):
        computed = losses(*inputs)
    torch.testing.assert_close(computed, expected)
