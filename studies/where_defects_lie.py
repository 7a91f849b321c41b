# SPDX-License-Identifier: Apache-2.0
"""Image AUROC by score and by where defects lie: how the figures of docs/results.md that go beyond anomalib's are made.

python studies/where_defects_lie.py --checkpoint model.ckpt --root PATH
"""

from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from sklearn.metrics import average_precision_score, roc_auc_score
from torchvision.transforms.v2 import InterpolationMode, Resize

from anomalib_fractalad import FractalAD
from anomalib_fractalad.image_files import read_image, read_mask
from anomalib_fractalad.models.components import ImageScore

SIZE = 256
SCORES = {name: ImageScore(name) for name in ("mean", "max", "top")}


def where_defects_lie(checkpoint: Path, root: Path) -> None:
    """Print image AUROC by score, by defect and by place, and AUROC on synthetic anomalies of unseen normal images.

    Args:
        checkpoint: A trained FractalAD.
        root: A data set in the layout test/good, test/<defect>, ground_truth/<defect>.
    """
    torch.manual_seed(0)
    model = FractalAD.load_from_checkpoint(checkpoint, visualizer=False).eval()
    good = load(sorted((root / "test/good").iterdir()))
    normal = scores(model, good)
    defective, inside = {}, {}
    for folder in sorted((root / "ground_truth").iterdir()):
        masks = sorted(folder.iterdir())
        images = [next((root / "test" / folder.name).glob(f"{mask.stem}.*")) for mask in masks]
        defective[folder.name] = scores(model, load(images))
        inside[folder.name] = np.array([share_inside(mask) for mask in masks])
    place, every = np.concatenate(list(inside.values())), np.concatenate(list(defective.values()))
    groups = {
        **defective,
        "all": every,
        "at least 90 % inside": every[place >= 0.9],
        "50 to 90 % inside": every[(place >= 0.5) & (place < 0.9)],
        "less than 50 % inside": every[place < 0.5],
    }
    for name, anomalous in groups.items():
        values = ", ".join(f"{score} {auroc(normal[:, i], anomalous[:, i]):.3f}" for i, score in enumerate(SCORES))
        print(f"{name} ({len(anomalous)} images): image AUROC {values}")

    _, anomalous, masks = model.generator.augment(good[:96])
    maps, labels = predict(model, anomalous).flatten().numpy(), masks.flatten().numpy()
    print(f"synthetic: pixel AUROC {roc_auc_score(labels, maps):.3f}, AP {average_precision_score(labels, maps):.3f}")


def load(files: list[Path]) -> torch.Tensor:
    resize = Resize((SIZE, SIZE), antialias=True)
    return torch.stack([resize(read_image(file, as_tensor=True)) for file in files]).clamp(0, 1)


@torch.inference_mode()
def predict(model: FractalAD, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.model(batch).anomaly_map for batch in images.split(32)])


def scores(model: FractalAD, images: torch.Tensor) -> np.ndarray:
    maps = predict(model, images)
    return torch.stack([score(maps) for score in SCORES.values()], dim=1).numpy()


def share_inside(mask: Path, margin: float = 0.1) -> float:
    """Share of a defect in the inner part of the image, where the generator makes anomalies."""
    resize = Resize((SIZE, SIZE), interpolation=InterpolationMode.NEAREST)
    defect = resize(read_mask(mask, as_tensor=True).unsqueeze(0)).squeeze() > 0
    border = round(margin * SIZE)
    return float(defect[border:-border, border:-border].sum() / defect.sum().clamp(min=1))


def auroc(normal: np.ndarray, anomalous: np.ndarray) -> float:
    return float(roc_auc_score(np.repeat([0, 1], [len(normal), len(anomalous)]), np.concatenate([normal, anomalous])))


if __name__ == "__main__":
    auto_cli(where_defects_lie, as_positional=False)
