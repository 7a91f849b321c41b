# SPDX-License-Identifier: Apache-2.0
"""What the studies share: images, synthetic defects in them, and how well a model finds these."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from anomalib.models import AnomalibModule
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision.transforms.v2.functional import resize

from anomalib_fractalad.build import DEFECTS
from anomalib_fractalad.image_files import read_image

SMALL = ("fractal", "faint fractal", "faint Perlin", "scar")
TILE = re.compile(r"exp\d_num_(\d+)")

Batch = tuple[Tensor, Tensor]
Predict = Callable[[Tensor], tuple[Tensor, Tensor]]


def read_images(files: Iterable[Path], size: int) -> Tensor:
    """Images in one batch, (B, 3, size, size), values in [0, 1]."""
    return torch.stack([resize(read_image(file, as_tensor=True), [size, size]) for file in files]).clamp(0, 1)


def make_defects(normal: Tensor, kinds: Iterable[str] = tuple(DEFECTS)) -> dict[str, Batch]:
    """A defect in each of some images (B, 3, H, W), and its mask (B, 1, H, W), by kind."""
    made = {kind: [DEFECTS[kind](image, seed=seed) for seed, image in enumerate(normal)] for kind in kinds}
    return {
        kind: (torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]))
        for kind, pairs in made.items()
    }


@torch.inference_mode()
def predict(model: AnomalibModule, images: Tensor) -> tuple[Tensor, Tensor]:
    """Raw maps at the images' size (B, 1, H, W), and scores (B,)."""
    outputs = [model.model(model.pre_processor(batch)) for batch in images.split(16)]
    maps = torch.cat([output.anomaly_map for output in outputs])
    scores = torch.cat([output.pred_score.flatten() for output in outputs])
    return interpolate(maps, size=images.shape[-2:], mode="bilinear"), scores


def figures(found: Predict, normal: Tensor, kinds: Mapping[str, Batch]) -> list[tuple[float, float]]:
    """Pixel AP and image AUROC by kind of defect, and their means."""
    _, low = found(normal)
    values = []
    for images, masks in kinds.values():
        maps, scores = found(images)
        values.append((float(binary_average_precision(maps, masks.long())), auroc(low, scores)))
    mean_precision, mean_area = torch.tensor(values).mean(dim=0).tolist()
    return [*values, (mean_precision, mean_area)]


def table_row(name: str, values: Sequence[tuple[float, float]]) -> str:
    """A line of pairs of figures."""
    return f"{name:36} " + " ".join(f"{precision:.3f}, {area:.3f}" for precision, area in values)


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """Area under the ROC curve of the scores of normal and anomalous images."""
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))]).long()
    scores = torch.cat([normal, anomalous])
    return float(binary_auroc((scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-30), labels))


def by_tile(files: Iterable[Path], gap: int) -> list[list[Path]]:
    """Groups of files that hold all photographs of a magnetic tile, in the order of their numbers."""
    ordered = sorted(files, key=tile_number)
    starts = [i for i, (a, b) in enumerate(pairwise(ordered), 1) if tile_number(b) - tile_number(a) > gap]
    return [ordered[first:last] for first, last in pairwise([0, *starts, len(ordered)])]


def tile_number(file: Path) -> int:
    """The number that grows from photograph to photograph."""
    found = TILE.match(file.name)
    if found is None:
        msg = f"{file} is not named as the magnetic tiles are, exp<exposure>_num_<number>"
        raise ValueError(msg)
    return int(found[1])
