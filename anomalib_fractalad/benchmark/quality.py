# SPDX-License-Identifier: Apache-2.0
"""How well one model finds the defects of one data set, by its raw scores and maps."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_fractalad.image_files import open_rgb
from anomalib_fractalad.training.checkpoint_io import AtomicCheckpointIO

Score = tuple[str, bool, float]


class _Predicted(NamedTuple):
    """A test image: path, label, score, map (H, W) and mask (H, W) as far as there are any."""

    path: str
    anomalous: bool
    score: float
    anomaly_map: Tensor | None
    mask: Tensor | None


class ScoreCollector(Callback):
    """Keeps each test image's score and map as the network gives them, for metrics and for the sheet of heat maps.

    anomalib's post-processing clamps: whatever lies far enough from the threshold becomes 0 or 1, so that metrics of
    the clamped maps depend on where the threshold lies. It must be off during the test, see :func:`raw_predictions`.

    Args:
        sheet_paths: Images for the sheet.
        folder: Where the images of the sheet go.

    Attributes:
        sheet: For each image of the sheet its path, and its score once it is drawn.
    """

    def __init__(self, sheet_paths: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.sheet: list[dict[str, Any]] = [{"image_path": path} for path in sheet_paths]
        self._predicted: list[_Predicted] = []

    @property
    def scores(self) -> list[Score]:
        """Path, label and score of each test image."""
        return [(image.path, image.anomalous, image.score) for image in self._predicted]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a batch.

        Raises:
            ValueError: If a score or a map holds a value that is not a number.
        """
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        for i, path in enumerate(map(str, batch.image_path)):
            parts = [None if part is None else part[i] for part in (batch.anomaly_map, batch.gt_mask)]
            found, mask = (None if part is None else part.detach().cpu().squeeze() for part in parts)
            image = _Predicted(
                path,
                bool(batch.gt_label[i]),
                batch.pred_score[i].item(),
                None if found is None else found.float(),
                mask,
            )
            if image.score != image.score or (found is not None and found.isnan().any()):
                msg = f"the prediction of {path} is not a number"
                raise ValueError(msg)
            self._predicted.append(image)

    def quality(self) -> dict[str, float]:
        """Metrics by name; pixel metrics only where there are masks and maps."""
        labels = torch.tensor([image.anomalous for image in self._predicted])
        scores = torch.tensor([image.score for image in self._predicted], dtype=torch.float64)
        found = {f"image_{kind.__name__}": _compute(kind, _rescaled(scores), labels) for kind in (AUROC, AUPR, F1Max)}
        pixels = [image for image in self._predicted if image.anomaly_map is not None and image.mask is not None]
        if pixels:
            maps = torch.stack([image.anomaly_map for image in pixels if image.anomaly_map is not None])
            masks = torch.stack([image.mask for image in pixels if image.mask is not None])
            rescaled = _rescaled(maps)
            found |= {f"pixel_{kind.__name__}": _compute(kind, rescaled, masks) for kind in (AUROC, AUPR, F1Max)}
            found["pixel_AUPRO"] = _compute(AUPRO, maps, masks)
        return found

    def draw(self) -> None:
        """Draw the sheet's images, each map from the lowest to the highest value of all test images' maps."""
        maps = [image.anomaly_map for image in self._predicted if image.anomaly_map is not None]
        if not maps:
            return
        low, high = min(found.min() for found in maps), max(found.max() for found in maps)
        by_path = {image.path: image for image in self._predicted}
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, entry in enumerate(self.sheet):
            image = by_path.get(entry["image_path"])
            if image is None or image.anomaly_map is None:
                continue
            entry["score"] = image.score
            heat_map = visualize_anomaly_map((image.anomaly_map - low) / (high - low).clamp(min=1e-30))
            plain = open_rgb(image.path).resize(heat_map.size)
            plain.save(self.folder / f"image_{number}.png")
            overlay_images(plain, heat_map).save(self.folder / f"map_{number}.png")
            if image.mask is not None:
                to_pil_image(image.mask.float()).save(self.folder / f"mask_{number}.png")


def _rescaled(values: Tensor) -> Tensor:
    """Values in [0, 1] in the same order: torchmetrics would take the sigmoid of others, batch by batch."""
    low, high = values.aminmax()
    if low >= 0 and high <= 1:
        return values
    return (values.double() - low) / (high.double() - low).clamp(min=1e-300)


def _compute(metric_class: Any, predictions: Tensor, truth: Tensor) -> float:
    metric = metric_class(["predictions", "truth"])
    metric.update(SimpleNamespace(predictions=predictions, truth=truth))
    return float(metric.compute())


def sheet_paths(datamodule: AnomalibDataModule, count: int) -> list[str]:
    """Test images from each folder in turn, from the middle of each on.

    Args:
        datamodule: Data with test images.
        count: Number of images.
    """
    folders: dict[str, list[str]] = {}
    for path in sorted(map(str, datamodule.test_data.samples.image_path)):
        folders.setdefault(Path(path).parent.name, []).append(path)
    halves = [paths[len(paths) // 2 :] + paths[: len(paths) // 2] for paths in folders.values()]
    return [path for path in chain.from_iterable(zip_longest(*halves)) if path is not None][:count]


def prepare_test(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    accelerator: str,
    root: Path,
    checkpoint: Path,
    is_complete: bool,
) -> None:
    """Load a trained model, and set its thresholds on the validation images where there are any.

    Args:
        model: The model, with its own evaluator, whose state a checkpoint holds too.
        datamodule: Its data.
        accelerator: Lightning's accelerator.
        root: Folder for Lightning's files.
        checkpoint: The trained model.
        is_complete: Whether the checkpoint holds the thresholds already; else they are added to it.
    """
    has_validation = hasattr(datamodule, "val_data")
    engine = Engine(
        plugins=[AtomicCheckpointIO()],
        accelerator=accelerator,
        devices=1,
        default_root_dir=root,
        enable_progress_bar=False,
    )
    run = engine.validate if has_validation else engine.test
    run(model, datamodule=datamodule, ckpt_path=checkpoint)
    if has_validation and not is_complete:
        engine.trainer.save_checkpoint(checkpoint, weights_only=True)


@contextlib.contextmanager
def raw_predictions(model: AnomalibModule) -> Iterator[None]:
    """Take a model's post-processing and metrics off, so that a test sees what the network gives.

    Args:
        model: The model.
    """
    before = model.post_processor, model.evaluator
    model.post_processor = model.evaluator = None
    try:
        yield
    finally:
        model.post_processor, model.evaluator = before


def evaluate(
    model: AnomalibModule,
    datamodule: AnomalibDataModule,
    collector: ScoreCollector,
    accelerator: str,
    root: Path,
) -> tuple[dict[str, float], dict[str, float], str]:
    """Test a model by its raw scores and maps.

    Args:
        model: A trained model.
        datamodule: Its data.
        collector: Holds the images' scores afterwards.
        accelerator: Lightning's accelerator.
        root: Folder for Lightning's files.

    Returns:
        Metrics by name, pixel metrics only where there are masks; image AUROC by type of defect; type of the device.
    """
    engine = Engine(
        callbacks=[collector], accelerator=accelerator, devices=1, default_root_dir=root, enable_progress_bar=False
    )
    with raw_predictions(model):
        engine.test(model, datamodule=datamodule, verbose=False)
    collector.draw()
    return collector.quality(), defect_auroc(collector.scores), engine.trainer.strategy.root_device.type


def defect_auroc(scores: Sequence[Score]) -> dict[str, float]:
    """Image AUROC of each type of defect, which the folder of its images names, against all normal images.

    Args:
        scores: Path, whether there is a defect, and score of each image.

    Returns:
        AUROC by folder name; empty without normal images.
    """
    normal = [score for _, anomalous, score in scores if not anomalous]
    defects: dict[str, list[float]] = {}
    for path, anomalous, score in scores:
        if anomalous:
            defects.setdefault(Path(path).parent.name, []).append(score)
    if not normal:
        return {}
    return {name: auroc([0] * len(normal) + [1] * len(some), normal + some) for name, some in sorted(defects.items())}


def auroc(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Area under the ROC curve of any scores.

    Args:
        labels: 0 or 1 of each image.
        scores: The images' scores.
    """
    return float(binary_auroc(_rescaled(torch.tensor(scores, dtype=torch.float64)), torch.tensor(labels)))
