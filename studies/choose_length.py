# SPDX-License-Identifier: Apache-2.0
"""How long AAND's stage II should be, by synthetic defects in normal training images.

python studies/choose_length.py --checkpoint model.ckpt --images PATH --held PATH
"""

from functools import partial
from pathlib import Path

import torch
from common import SMALL, figures, make_defects, predict, read_images, table_row
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor

from anomalib_fractalad import AAND
from anomalib_fractalad.models.aand.stages import StagePlan
from anomalib_fractalad.models.aand.student import reverse_student


def choose_length(
    checkpoint: Path,
    images: Path,
    held: Path,
    epochs: tuple[int, ...] = (6, 18),
    batch_size: int = 16,
    size: int = 256,
) -> dict[int, list[tuple[float, float]]]:
    """Print pixel AP and image AUROC of a student trained anew for each length, by kind of synthetic defect.

    The advanced teacher does not change in stage II, so that its features are computed once.

    Args:
        checkpoint: A trained AAND, whose amplifiers are taken.
        images: A folder of normal images to train on.
        held: A folder of normal images that the model was not trained on, to make defects in.
        epochs: Lengths of stage II to try.
        batch_size: Number of images in a batch.
        size: Height and width that images are resized to.

    Returns:
        The figures by length.
    """
    seed_everything(0)
    model = AAND.load_from_checkpoint(checkpoint, visualizer=False).cpu().eval()
    normal = read_images(sorted(held.iterdir()), size)
    kinds = make_defects(normal, SMALL)
    levels = advanced_features(model, sorted(images.iterdir()), size)
    print(f"{len(normal)} normal images; pixel AP, image AUROC of {', '.join(kinds)}; mean")
    results = {}
    for length in epochs:
        train_student(model, levels, length, batch_size)
        results[length] = figures(partial(predict, model.eval()), normal, kinds)
        print(table_row(f"{length} epochs", results[length]), flush=True)
    return results


@torch.inference_mode()
def advanced_features(model: AAND, files: list[Path], size: int) -> list[Tensor]:
    """Features of all images, for each level, in half of their precision."""
    batches = [
        model.model.advanced_teacher(model.pre_processor(read_images(files[first : first + 16], size)))
        for first in range(0, len(files), 16)
    ]
    # As convolutions on a CPU like them.
    return [torch.cat(s).to(torch.bfloat16, memory_format=torch.channels_last) for s in zip(*batches, strict=True)]


def train_student(model: AAND, levels: list[Tensor], epochs: int, batch_size: int) -> None:
    """Stage II with a new student."""
    seed_everything(0)
    teacher = model.model.teacher
    student = model.model.student = reverse_student(
        model.hparams["backbone"], teacher.channels, teacher.strides, model.hparams["fine_embedding"]
    )
    count = len(levels[0])
    model.plan = StagePlan(0, epochs * -(-count // batch_size))
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(epochs):
        for chosen in torch.randperm(count).split(batch_size):
            features = [level[chosen] for level in levels]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.distillation_loss(features, student(features))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    auto_cli(choose_length, as_positional=False)
