# SPDX-License-Identifier: Apache-2.0
"""What holds for every model of the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from conftest import small_engine

import anomalib_fractalad
from anomalib_fractalad.plugin import MODELS


def small_model(name: str, **arguments: Any) -> Any:
    extra = {"patches": 2} if name == "ADPS" else {}
    kind = getattr(anomalib_fractalad, name)
    return kind(backbone="test_resnet", pre_trained=False, visualizer=False, **extra, **arguments)


@pytest.mark.parametrize(
    ("name", "part"),
    [("FractalAD", "bce"), ("ADPS", "distillation"), ("AAND", "focal")],
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
    message = rf"the {part} loss of {name} is (nan|inf) in epoch 0, step 0, on the images .*good.*\.png.* lower the"
    with pytest.raises(FloatingPointError, match=message):
        small_engine(tmp_path, max_epochs=2).fit(model, datamodule=tiles)


@pytest.mark.parametrize("name", MODELS)
def test_losses_of_mixed_precision_are_numbers(name: str, tiles: Folder, tmp_path: Path) -> None:
    model = small_model(name)
    small_engine(tmp_path, max_epochs=2, precision="bf16-mixed").fit(model, datamodule=tiles)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.trainer.callback_metrics["train_loss"].dtype == torch.float32
