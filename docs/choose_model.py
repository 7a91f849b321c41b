# SPDX-License-Identifier: Apache-2.0
"""Which of several models to take, chosen without test images: synthetic anomalies in normal training images.

python docs/choose_model.py --checkpoints "[a.ckpt, b.ckpt]" --images PATH
"""

from pathlib import Path

import torch
from anomalib.models import AnomalibModule
from choose_alignment import pixel_precision, table_row
from choose_stages import anomalies, auroc, read_images
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor
from torch.nn.functional import interpolate

from anomalib_fractalad import AAND


def choose_model(checkpoints: list[Path], images: Path, every: int = 1, size: int = 256) -> None:
    """Print pixel AP and image AUROC of each model, by kind of synthetic anomaly.

    Args:
        checkpoints: Trained AANDs, each of which resizes images as it was trained to.
        images: A folder of normal images, best of such as no model was trained on.
        every: Take every n-th image.
        size: Height and width that anomalies are made in, and maps compared in.
    """
    seed_everything(0)
    normal = read_images(sorted(images.iterdir())[::every], size)
    kinds = anomalies(normal)
    print(f"{len(normal)} normal images; pixel AP, image AUROC of {', '.join(kinds)}; mean")
    for checkpoint in checkpoints:
        model = AAND.load_from_checkpoint(checkpoint, visualizer=False).cpu().eval()
        print(checkpoint, evaluate(model, normal, kinds))


def evaluate(model: AAND, normal: Tensor, kinds: dict[str, Tensor]) -> str:
    """Pixel AP and image AUROC by kind of synthetic anomaly, and their means."""
    _, low = predict(model, normal)
    values = []
    for batch in kinds.values():
        maps, scores = predict(model, batch)
        values.append([pixel_precision(maps, batch, normal), auroc(low, scores)])
    return table_row(values)


@torch.inference_mode()
def predict(model: AnomalibModule, images: Tensor) -> tuple[Tensor, Tensor]:
    """Maps at the images' size, and scores."""
    outputs = [model.model(model.pre_processor(batch)) for batch in images.split(16)]
    maps = torch.cat([output.anomaly_map for output in outputs])
    return interpolate(maps, size=images.shape[-2:], mode="bilinear"), torch.cat(
        [o.pred_score.flatten() for o in outputs]
    )


if __name__ == "__main__":
    auto_cli(choose_model, as_positional=False)
