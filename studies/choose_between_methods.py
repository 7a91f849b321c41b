# SPDX-License-Identifier: Apache-2.0
"""AANDs and PatchCore on synthetic defects, in normal training images that none of them has seen.

python studies/choose_between_methods.py --checkpoints "[a.ckpt, b.ckpt]" --images PATH --held PATH
"""

from functools import partial
from pathlib import Path

import torch
from anomalib.models import AnomalibModule, Patchcore
from common import figures, make_defects, predict, read_images, table_row
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor

from anomalib_fractalad import AAND
from anomalib_fractalad.build import DEFECTS


def choose_between_methods(
    checkpoints: list[Path],
    images: Path,
    held: Path,
    kinds: tuple[str, ...] = tuple(DEFECTS),
    mirror: bool = False,
    backbone: str = "mobilenetv1_100",
    layers: tuple[str, ...] = ("blocks.2", "blocks.3"),
    pre_trained: bool = True,
    memory: int = 20000,
    size: int = 256,
) -> dict[str, list[tuple[float, float]]]:
    """Print pixel AP and image AUROC of each model, by kind of defect.

    Args:
        checkpoints: AANDs that were trained on ``images``, each of which resizes images as it was trained to.
        images: A folder of normal images, which PatchCore takes its memory from.
        held: A folder of normal images that nothing was trained on, to make defects in.
        kinds: Kinds of defect.
        mirror: Also take the mean of the maps of four mirrored images.
        backbone: PatchCore's backbone.
        layers: PatchCore's layers.
        pre_trained: Whether PatchCore's backbone has ImageNet weights.
        memory: Number of PatchCore's memory items, drawn at random; 0 leaves PatchCore out.
        size: Height and width that defects are made in, and maps compared in.

    Returns:
        The figures by model.
    """
    seed_everything(0)
    normal = read_images(sorted(held.iterdir()), size)
    made = make_defects(normal, kinds)
    models: dict[str, AnomalibModule] = {
        checkpoint.stem: AAND.load_from_checkpoint(checkpoint, visualizer=False).cpu().eval()
        for checkpoint in checkpoints
    }
    if memory:
        patchcore = Patchcore(backbone=backbone, layers=layers, pre_trained=pre_trained, visualizer=False).eval()
        remember(patchcore, sorted(images.iterdir()), memory, size)
        models["PatchCore"] = patchcore
    print(f"{len(normal)} normal images; pixel AP, image AUROC of {', '.join(made)}; mean")
    results = {}
    for name, model in models.items():
        for suffix, found in (("", predict), (", mirrored", predict_mirrored))[: 1 + mirror]:
            results[name + suffix] = figures(partial(found, model), normal, made)
            print(table_row(name + suffix, results[name + suffix]), flush=True)
    return results


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


def predict_mirrored(model: AnomalibModule, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the maps of four mirrored images, and its highest values."""
    ways: list[list[int]] = [[], [-1], [-2], [-2, -1]]
    mean = torch.stack([predict(model, images.flip(way))[0].flip(way) for way in ways]).mean(dim=0)
    return mean, mean.amax(dim=(1, 2, 3))


if __name__ == "__main__":
    auto_cli(choose_between_methods, as_positional=False)
