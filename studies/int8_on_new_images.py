# SPDX-License-Identifier: Apache-2.0
"""What INT8 costs, on far more images than a category of SurfaceDefects has: its painters paint new ones.

python studies/int8_on_new_images.py --float32 model.xml --int8 model_int8.xml --category molded_part
"""

from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from openvino import Core
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_fractalad.benchmark.exports import FLOAT32
from anomalib_fractalad.data._painters import PAINTERS, paint

SEED = 800  # far from those of the data set


def int8_on_new_images(float32: Path, int8: Path, category: str, images: int = 200) -> None:
    """Print the image AUROC of two exports of a model, computing in float32 and in what OpenVINO chooses.

    Args:
        float32: An exported model, .xml.
        int8: The same model, quantized.
        category: A category of SurfaceDefects.
        images: Normal images, and as many with a defect, of all types and severities.
    """
    defects = PAINTERS[category].DEFECTS
    each = images // len(defects)
    normal = [tensor(paint(category, (SEED, i)).image) for i in range(images)]
    flawed = [
        tensor(paint(category, (SEED + 1 + group, i), defect, 0.15 + 0.85 * i / (each - 1)).image)
        for group, defect in enumerate(defects)
        for i in range(each)
    ]
    labels = torch.tensor([0] * len(normal) + [1] * len(flawed))
    core = Core()
    for name, file, settings in (
        ("float32", float32, FLOAT32),
        ("float32's file, OpenVINO's choice", float32, {}),
        ("INT8, OpenVINO's choice", int8, {}),
    ):
        predict = core.compile_model(file, "CPU", settings)
        scores = torch.tensor([float(predict(image)["pred_score"].item()) for image in normal + flawed])
        print(f"{name}: {binary_auroc(scores, labels):.3f}", flush=True)


def tensor(image: np.ndarray) -> np.ndarray:
    """An image as the exported models take it, (1, 3, H, W), values in [0, 1]."""
    return to_dtype(to_image(image), torch.float32, scale=True)[None].numpy()


if __name__ == "__main__":
    auto_cli(int8_on_new_images, as_positional=False)
