# SPDX-License-Identifier: Apache-2.0
"""How early levels should saturate in FractalMemory's maps, by faint defects in new images of SurfaceDefects' painters.

python studies/choose_saturation.py

How large images should be, by the same defects:

python studies/choose_saturation.py --strengths "[1.0]" --sizes "[256,320,384]"

Neither the images nor the defects are those of the data set: other seeds, and severities that its test images begin
with. Pixel AP is of the pixels of all images at once, as the benchmark's is.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from common import predict
from jsonargparse import auto_cli
from lightning import seed_everything
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchvision.transforms.v2.functional import to_dtype, to_image

from anomalib_fractalad import FractalMemory, SurfaceDefects
from anomalib_fractalad.data._painters import PAINTERS, paint

SEED = 500  # far from those of the data set


def choose_saturation(
    categories: Sequence[str] = tuple(PAINTERS),
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    sizes: Sequence[int] = (320,),
    images: int = 40,
    severity: float = 0.3,
    root: Path = Path("datasets/SurfaceDefects"),
) -> None:
    """Print image AUROC, pixel AP and AUPRO of a memory for each size of images, by the strength of the saturation.

    Args:
        categories: Categories of SurfaceDefects.
        strengths: What to try; 0 is no saturation. Image AUROC is of the score, and of the map's own score.
        sizes: Heights and widths that images are resized to. Painted ones have 256.
        images: Good images, and half as many with each type of defect.
        severity: Severity of the strongest defect; the faintest has 0.
        root: Where the training images are, or are to be written.
    """
    for category in categories:
        samples = [paint(category, (SEED, i)) for i in range(images)]
        for group, defect in enumerate(PAINTERS[category].DEFECTS, start=1):
            for i in range(images // 2):
                sample = paint(category, (SEED + group, i), defect, severity * 2 * i / images)
                if sample.mask.any():
                    samples.append(sample)
        pixels = torch.stack([to_dtype(to_image(sample.image), torch.float32, scale=True) for sample in samples])
        masks = torch.stack([torch.from_numpy(sample.mask > 0) for sample in samples])
        for size in sizes:
            model = _trained(category, size, root)
            for strength in strengths:
                model.model.saturation.strength = strength
                maps, scores = predict(model, pixels)
                found = quality(model, maps, scores, masks)
                print(category, size, strength, *(f"{value:.3f}" for value in found), flush=True)


def _trained(category: str, size: int, root: Path) -> FractalMemory:
    seed_everything(0)
    model = FractalMemory(pre_processor=FractalMemory.configure_pre_processor((size, size)))
    with tempfile.TemporaryDirectory() as folder:
        data = SurfaceDefects(root=root, category=category, num_workers=0)
        engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False)
        engine.fit(model, datamodule=data)
    return model.eval()


def quality(model: FractalMemory, maps: Tensor, scores: Tensor, masks: Tensor) -> list[float]:
    """Image AUROC of the scores and of the maps, pixel AP and AUPRO."""
    labels = masks.flatten(1).any(dim=1).long()
    regions = AUPRO(["maps", "masks"])
    regions.update(SimpleNamespace(maps=maps.squeeze(1), masks=masks))
    return [
        *(float(binary_auroc(found, labels)) for found in (scores, model.model.score(maps))),
        float(binary_average_precision(maps.flatten(), masks.flatten().long())),
        float(regions.compute()),
    ]


if __name__ == "__main__":
    auto_cli(choose_saturation, as_positional=False)
