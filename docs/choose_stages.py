# SPDX-License-Identifier: Apache-2.0
"""Which stages AAND should compare, chosen without test images: synthetic anomalies in normal training images.

python docs/choose_stages.py --checkpoint model.ckpt --images PATH
"""

from itertools import combinations
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.models.image.foundad.components.cutpaste import CutPasteScar
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import resize

from anomalib_fractalad import AAND, FractalAnomalyGenerator
from anomalib_fractalad.models.aand.torch_model import distance_map
from anomalib_fractalad.models.components import AlignedUpsample

FAINT = 0.4


def choose_stages(checkpoint: Path, images: Path, every: int = 8, size: int = 256) -> None:
    """Print the image AUROC of every choice of stages, by kind of synthetic anomaly.

    Args:
        checkpoint: A trained AAND.
        images: A folder of normal images.
        every: Take every n-th image.
        size: Height and width that images are resized to.
    """
    seed_everything(0)
    model = AAND.load_from_checkpoint(checkpoint, visualizer=False).model.eval()
    normal = read_images(sorted(images.iterdir())[1::every], size)
    kinds = {name: features(model, batch) for name, batch in anomalies(normal).items()}
    reference = features(model, normal)
    print(f"{len(normal)} normal images; image AUROC by stages (strides) and kind: {', '.join(kinds)}; mean")
    strides = model.teacher.strides
    for count in range(1, len(strides) + 1):
        for chosen in combinations(range(len(strides)), count):
            low = scores(model, reference, chosen, size)
            values = [auroc(low, scores(model, kind, chosen, size)) for kind in kinds.values()]
            figures = " ".join(f"{value:.3f}" for value in [*values, sum(values) / len(values)])
            print(f"{[strides[i] for i in chosen]!s:12} {figures}")


def read_images(files: list[Path], size: int) -> Tensor:
    """Images in one batch, (B, 3, size, size), values in [0, 1]."""
    return torch.stack([resize(read_image(file, as_tensor=True), [size, size]) for file in files]).clamp(0, 1)


def anomalies(normal: Tensor) -> dict[str, Tensor]:
    """Anomalous versions of images (B, 3, H, W), each kind in every image, some of them faint."""
    fractal, _ = FractalAnomalyGenerator(position_margin=0)(normal)
    perlin = PerlinAnomalyGenerator(probability=1.0)
    noisy = torch.cat([perlin(image.unsqueeze(0))[0] for image in normal]).clamp(0, 1)
    scar = CutPasteScar(color_jitter=None)
    return {
        "fractal": fractal,
        "faint fractal": normal.lerp(fractal, FAINT),
        "faint Perlin": normal.lerp(noisy, FAINT),
        "scar": torch.stack([scar(image) for image in normal]),
    }


@torch.inference_mode()
def features(model: torch.nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Teacher's and student's features of each stage."""
    batches = []
    for batch in images.split(16):
        teacher = model.advanced_teacher(batch)
        batches.append([*zip(teacher, model.student(teacher), strict=True)])
    return [tuple(map(torch.cat, zip(*stage, strict=True))) for stage in zip(*batches, strict=True)]


@torch.inference_mode()
def scores(model: torch.nn.Module, stages: list[tuple[Tensor, Tensor]], chosen: tuple[int, ...], size: int) -> Tensor:
    """Image scores by the chosen stages."""
    teacher, student = zip(*(stages[i] for i in chosen), strict=True)
    return model.score(model.smooth(distance_map(teacher, student, (size, size), len(chosen) * [AlignedUpsample()])))


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))]).long()
    return float(binary_auroc(torch.cat([normal, anomalous]), labels))


if __name__ == "__main__":
    auto_cli(choose_stages, as_positional=False)
