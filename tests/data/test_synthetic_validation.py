# SPDX-License-Identifier: Apache-2.0
"""Validation on anomalies of a generator of one's choice, for models of this package and others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.models import Padim
from conftest import make_tiles, small_engine

from anomalib_fractalad.data import SyntheticValidation
from anomalib_fractalad.image_files import read_image, read_mask
from anomalib_fractalad.transforms import FractalAnomalyGenerator


def pixels(data: SyntheticValidation) -> list[np.ndarray]:
    return [read_image(path) for path in data.val_data.samples.image_path]


def test_validation_images_have_anomalies_of_the_generator(tile_root: Path) -> None:
    class Squares(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask = torch.zeros_like(image[:1])
            mask[:, 20:30, 10:40] = 1
            return torch.where(mask > 0, 0.0, image), mask

    data = SyntheticValidation(make_tiles(tile_root), Squares(), val_split_ratio=0.5, seed=0)
    data.setup()
    samples = data.val_data.samples
    assert sorted(samples.label_index) == [0, 0, 1, 1]
    assert (len(data.train_data), len(data.test_data)) == (4, 8)
    assert not set(data.train_data.samples.image_path) & set(samples.image_path)
    for sample in samples[samples.label_index == 1].itertuples():
        assert np.all(read_image(sample.image_path)[20:30, 10:40] == 0)
        assert read_mask(sample.mask_path).astype(bool).sum() == 300
    with pytest.raises(ValueError, match="val_split_ratio is 1; it must be above 0 and below 1"):
        SyntheticValidation(make_tiles(tile_root), val_split_ratio=1)


def test_another_model_finds_its_threshold_on_fractal_anomalies(tile_root: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    data, again = (SyntheticValidation(make_tiles(tile_root), val_split_ratio=0.5, seed=1) for _ in range(2))
    for module in (data, again):
        module.setup()
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(data.generator, FractalAnomalyGenerator)
    assert all(np.array_equal(one, other) for one, other in zip(pixels(data), pixels(again), strict=True))
    program = AnomalibCLI(
        [
            *(
                "fit",
                "--model",
                "Padim",
                "--model.pre_trained",
                "false",
                "--data",
                "anomalib_fractalad.data.SyntheticValidation",
            ),
            *("--data.data", "Folder", "--data.data.name", "tiles", "--data.data.normal_dir", str(tile_root)),
        ],
        run=False,
    )
    assert isinstance(program.datamodule, SyntheticValidation)
    model = Padim(backbone="resnet18", pre_trained=False, layers=["layer1"], n_features=8, visualizer=False)
    small_engine(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert 0 < model.post_processor.image_threshold < torch.inf
