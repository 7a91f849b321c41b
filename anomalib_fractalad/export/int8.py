# SPDX-License-Identifier: Apache-2.0
"""INT8: the recipe, and the images that it is calibrated with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from anomalib.data import AnomalibDataModule

from anomalib_fractalad.transforms import FractalAnomalyGenerator

from .openvino import quantize_features

if TYPE_CHECKING:
    from openvino import Model


def calibration_images(datamodule: AnomalibDataModule, count: int = 300, seed: int = 0) -> Sequence[np.ndarray]:
    """Training images, every second one with a fractal anomaly.

    Args:
        datamodule: Data with training images.
        count: Number of images.
        seed: Seed of the choice of images and of the anomalies.

    Returns:
        Images (1, 3, H, W), float32, values in [0, 1].
    """
    datamodule.setup("fit")
    images = datamodule.train_data
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = FractalAnomalyGenerator()
        order = torch.randperm(len(images)).repeat(-(-count // (2 * len(images))))
        chosen = []
        for index in order[: -(-count // 2)].tolist():
            normal = images[index].image.unsqueeze(0)
            chosen += [normal.numpy(), generator(normal)[0].numpy()]
    return chosen[:count]


def quantize(model: "Model", images: Sequence[np.ndarray]) -> "Model":
    """Quantize a network to INT8 by the package's recipe.

    Args:
        model: An exported network.
        images: Images (1, 3, H, W) to calibrate with, values in [0, 1].

    Returns:
        The quantized network.
    """
    return quantize_features(model, [{"image": image} for image in images])
