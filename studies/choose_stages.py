# SPDX-License-Identifier: Apache-2.0
"""Which stages AAND should compare, and how it should align them, by synthetic defects in normal training images.

python studies/choose_stages.py --checkpoint model.ckpt --images PATH
"""

from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from common import SMALL, figures, make_defects, read_images, table_row
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.torch_model import distance_map
from anomalib_fractalad.models.components import AlignedUpsample


def choose_stages(
    checkpoint: Path, images: Path, kinds: tuple[str, ...] = SMALL, every: int = 8, first: int = 1, size: int = 256
) -> dict[str, list[tuple[float, float]]]:
    """Print pixel AP and image AUROC of every choice of stages and of both alignments, by kind of synthetic defect.

    Args:
        checkpoint: A trained AAND.
        images: A folder of normal images, best of such as the model was not trained on.
        kinds: Kinds of defect.
        every: Take every n-th image.
        first: From which one on.
        size: Height and width that images are resized to.

    Returns:
        The figures by choice.
    """
    seed_everything(0)
    network = AAND.load_from_checkpoint(checkpoint, visualizer=False).cpu().eval().model
    normal = read_images(sorted(images.iterdir())[first::every], size)
    made = make_defects(normal, kinds)
    strides: list[int] = network.teacher.strides
    print(f"{len(normal)} normal images; pixel AP, image AUROC of {', '.join(made)}; mean")
    results = {}
    for count in range(1, len(strides) + 1):
        for chosen in combinations(range(len(strides)), count):
            for alignment in ("corners", "centers"):
                name = f"{[strides[i] for i in chosen]} {alignment}"
                results[name] = figures(partial(predict, network, chosen, alignment), normal, made)
                print(table_row(name, results[name]), flush=True)
    return results


@torch.inference_mode()
def predict(network: torch.nn.Module, chosen: tuple[int, ...], alignment: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and scores by the chosen stages."""
    strides = [network.teacher.strides[i] if alignment == "centers" else None for i in chosen]
    upsample = [AlignedUpsample(stride) for stride in strides]
    maps = []
    for batch in images.split(16):
        teacher = network.advanced_teacher(batch)
        student = network.student(teacher)
        stages = ([features[i] for i in chosen] for features in (teacher, student))
        maps.append(network.smooth(distance_map(*stages, images.shape[-2:], upsample)))
    together = torch.cat(maps)
    return together, network.score(together).flatten()


if __name__ == "__main__":
    auto_cli(choose_stages, as_positional=False)
