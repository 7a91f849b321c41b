# SPDX-License-Identifier: Apache-2.0
"""AAND and PatchCore on synthetic defects of many kinds, in normal training images that neither has seen.

python docs/choose_between_methods.py --checkpoints "[a.ckpt, b.ckpt]" --images PATH --held PATH
"""

from functools import partial
from math import tau
from pathlib import Path

import torch
from anomalib.models import AnomalibModule, Patchcore
from choose_alignment import changed
from choose_model import predict
from choose_stages import anomalies, auroc, read_images
from jsonargparse import auto_cli
from kornia.filters import gaussian_blur2d
from lightning import seed_everything
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchmetrics.functional.classification import binary_average_precision
from torchvision.transforms.v2.functional import center_crop, resize

from anomalib_fractalad import AAND


def choose_between_methods(
    checkpoints: list[Path],
    images: Path,
    held: Path,
    backbone: str = "mobilenetv1_100",
    layers: tuple[str, ...] = ("blocks.2", "blocks.3"),
    memory: int = 20000,
    size: int = 256,
) -> None:
    """Print pixel AP and image AUROC of each model, and of AAND with the mean of the maps of four mirrored images.

    Args:
        checkpoints: AANDs that were trained on ``images``.
        images: A folder of normal images, which PatchCore takes its memory from.
        held: A folder of normal images that nothing was trained on, to make defects in.
        backbone: PatchCore's backbone.
        layers: PatchCore's layers.
        memory: Number of PatchCore's memory items, drawn at random.
        size: Height and width that images are resized to.
    """
    seed_everything(0)
    normal = read_images(sorted(held.iterdir()), size)
    kinds = defects(normal)
    print(f"{len(normal)} normal images; pixel AP, image AUROC")
    print(f"{'':36}", *(f"{kind:>13}" for kind in [*kinds, "mean"]))
    for checkpoint in checkpoints:
        model = AAND.load_from_checkpoint(checkpoint, visualizer=False).cpu().eval()
        compare(checkpoint.stem, model, normal, kinds)
    if memory:
        patchcore = Patchcore(backbone=backbone, layers=layers, visualizer=False).eval()
        remember(patchcore, sorted(images.iterdir()), memory, size)
        compare("PatchCore", patchcore, normal, kinds, mirror=False)


def defects(normal: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) with a defect in each and its mask (B, 1, H, W), by kind.

    Besides those of choose_stages.py: large soft-edged spots of another texture or brightness, and cracks.
    """
    made = {kind: (batch, changed(batch, normal)) for kind, batch in anomalies(normal).items()}
    spot = soft_spots(normal)
    textures = {
        "smooth": gaussian_blur2d(normal, (13, 13), (2.0, 2.0)),
        "rough": normal + 0.06 * torch.randn_like(normal[:, :1]),
        "zoomed": resize(center_crop(normal, [n // 2 for n in normal.shape[-2:]]), list(normal.shape[-2:])),
        "turned": normal.mT,
        "bright": normal + 0.2,
    }
    made |= {kind: (normal.lerp(t, spot).clamp(0, 1), spot > 0.5) for kind, t in textures.items()}
    crack = cracks(normal)
    return made | {"crack": ((normal - 0.12 * crack).clamp(0, 1), crack > 0)}


def soft_spots(like: Tensor) -> Tensor:
    """A Gaussian spot in each image, (B, 1, H, W), values in [0, 1], of a standard deviation of 20 to 50 pixels."""
    rows, columns = (torch.arange(float(n)) for n in like.shape[-2:])
    spots = []
    for _ in like:
        row, column = (48 + torch.rand(1) * (n - 96) for n in like.shape[-2:])
        width = 20 + 30 * torch.rand(1)
        spots.append(torch.exp(-((rows[:, None] - row) ** 2 + (columns - column) ** 2) / (2 * width**2)))
    return torch.stack(spots).unsqueeze(1)


def cracks(like: Tensor, length: int = 70) -> Tensor:
    """A winding line in each image, two pixels wide, (B, 1, H, W), values 0 or 1."""
    lines = torch.zeros_like(like[:, :1])
    for line in lines:
        start = torch.stack([48 + torch.rand(1) * (n - 96) for n in like.shape[-2:]])
        angle = tau * torch.rand(1) + torch.cumsum(0.25 * torch.randn(length), 0)
        row, column = (start + torch.cumsum(torch.stack([angle.sin(), angle.cos()]), 1)).round().long()
        inside = (row >= 0) & (column >= 0) & (row < like.shape[-2]) & (column < like.shape[-1])
        line[0, row[inside], column[inside]] = 1
    return max_pool2d(lines, 2, 1, 1)[..., :-1, :-1]


@torch.inference_mode()
def remember(patchcore: Patchcore, files: list[Path], memory: int, size: int) -> None:
    """Fill PatchCore's memory with an equal number of random positions of each image."""
    network = patchcore.model
    network.train()
    kept = []
    for file in files:
        embedding = network(patchcore.pre_processor(read_images([file], size)))
        network.embedding_store.clear()
        kept.append(embedding[torch.randperm(len(embedding))[: -(-memory // len(files))]])
    network.memory_bank = torch.cat(kept)
    network.eval()


def compare(
    name: str, model: AnomalibModule, normal: Tensor, kinds: dict[str, tuple[Tensor, Tensor]], mirror: bool = True
) -> None:
    for suffix, mirrored in (("", False), (", mirrored", True))[: 1 + mirror]:
        found = partial(maps_and_scores, model, mirrored=mirrored)
        _, low = found(normal)
        figures = []
        for batch, mask in kinds.values():
            maps, scores = found(batch)
            figures.append((float(binary_average_precision(maps, mask.long())), auroc(low, scores)))
        figures.append(tuple(torch.tensor(figures).mean(dim=0).tolist()))
        print(f"{name + suffix:36}", *(f"{precision:.3f}, {area:.3f} " for precision, area in figures), flush=True)


def maps_and_scores(model: AnomalibModule, images: Tensor, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Maps at the images' size, and scores; of the mean over mirrored images if wished."""
    if not mirrored:
        return predict(model, images)
    ways: list[list[int]] = [[], [-1], [-2], [-2, -1]]
    mean = torch.stack([predict(model, images.flip(way))[0].flip(way) for way in ways]).mean(dim=0)
    return mean, mean.amax(dim=(1, 2, 3))


if __name__ == "__main__":
    auto_cli(choose_between_methods, as_positional=False)
