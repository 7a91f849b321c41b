# SPDX-License-Identifier: Apache-2.0
"""How AAND should align its stages, chosen without test images: synthetic anomalies in normal training images.

python docs/choose_alignment.py --checkpoint model.ckpt --images PATH
"""

from pathlib import Path

import torch
from choose_stages import anomalies, auroc, features, read_images
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.torch_model import distance_map
from anomalib_fractalad.models.components import AlignedUpsample

VISIBLE = 2 / 255


def choose_alignment(checkpoint: Path, images: Path, every: int = 1, size: int = 256) -> None:
    """Print pixel AP and image AUROC of both alignments, by kind of synthetic anomaly.

    Args:
        checkpoint: A trained AAND.
        images: A folder of normal images, best of such as the model was not trained on.
        every: Take every n-th image.
        size: Height and width that images are resized to.
    """
    seed_everything(0)
    model = AAND.load_from_checkpoint(checkpoint, visualizer=False).model.eval()
    normal = read_images(sorted(images.iterdir())[::every], size)
    kinds = anomalies(normal)
    stages = {name: features(model, batch) for name, batch in kinds.items()}
    reference = features(model, normal)
    print(f"{len(normal)} normal images; pixel AP, image AUROC of {', '.join(kinds)}; mean")
    for alignment, strides in (("corners", None), ("centres", model.teacher.strides)):
        low = model.score(maps(model, reference, strides, size))
        values = []
        for name, batch in kinds.items():
            found = maps(model, stages[name], strides, size)
            values.append([pixel_precision(found, batch, normal), auroc(low, model.score(found))])
        print(alignment, table_row(values))


def pixel_precision(maps: Tensor, images: Tensor, normal: Tensor) -> float:
    """Average precision of the pixels that differ visibly from normal images (B, 3, H, W)."""
    return float(binary_average_precision(maps, changed(images, normal).long()))


def changed(images: Tensor, normal: Tensor) -> Tensor:
    """Pixels that differ visibly from normal images (B, 3, H, W), (B, 1, H, W)."""
    return (images - normal).abs().amax(dim=1, keepdim=True) > VISIBLE


def table_row(values: list[list[float]]) -> str:
    """Pairs of figures, and their mean."""
    rows = [*values, torch.tensor(values).mean(dim=0).tolist()]
    return "  ".join(f"{precision:.3f} {area:.3f}" for precision, area in rows)


@torch.inference_mode()
def maps(model: torch.nn.Module, stages: list[tuple[Tensor, Tensor]], strides: list[int] | None, size: int) -> Tensor:
    """Anomaly maps of a model's stages."""
    teacher, student = zip(*stages, strict=True)
    upsample = [AlignedUpsample(stride) for stride in strides or len(stages) * [None]]
    return model.smooth(distance_map(teacher, student, (size, size), upsample))


if __name__ == "__main__":
    auto_cli(choose_alignment, as_positional=False)
