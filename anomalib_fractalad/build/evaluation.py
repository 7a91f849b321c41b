# SPDX-License-Identifier: Apache-2.0
"""How well a model tells good images from synthetic defects, with the spread over images."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import binary_average_precision

from anomalib_fractalad.models.components import ImageScore

from .split import data_module
from .trials import Trial

_REDRAWS = 500


class Outcome(NamedTuple):
    """What a model makes of trials, with one way from maps to scores.

    Attributes:
        score: Way from maps to scores; none for the model's own.
        quality: Mean of image AUROC and pixel AP of the defects that count.
        image_auroc: Mean over defects of the share of good images that score lower.
        pixel_ap: Mean over defects of the pixels' average precision.
        by_source: Quality by good image that defects were made of.
        by_kind: Image AUROC and pixel AP by kind of defect, all kinds.
    """

    score: str | None
    quality: float
    image_auroc: float
    pixel_ap: float
    by_source: dict[str, float]
    by_kind: dict[str, tuple[float, float]]


@torch.inference_mode()
def evaluate(
    model: AnomalibModule,
    trials: Sequence[Trial],
    *,
    scores: Sequence[str] = (),
    left_out: Iterable[str] = (),
    batch_size: int = 8,
    accelerator: str = "auto",
    show: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Compare a model's raw maps and scores with what is known of trials.

    Args:
        model: A trained model.
        trials: Good images and defects.
        scores: Ways from maps to scores; without any, the model's own.
        left_out: Kinds of defect that do not count.
        batch_size: Images in a batch.
        accelerator: Where the model runs.
        show: Called with how far it is.

    Returns:
        An outcome for each way, in their order.
    """
    by_file = {str(Path(trial.file).resolve()): trial for trial in trials}
    data = _data_of(trials, batch_size)
    data.test_augmentations = cast("PreProcessor", model.pre_processor).transform
    data.setup()
    device = device_of(accelerator)
    ways = {way: None if way is None else ImageScore(way) for way in (scores or (None,))}  # type: ignore[arg-type]
    found: list[tuple[Trial, float, list[float]]] = []
    model.to(device).eval()
    for batch in data.test_dataloader():
        show(f"looking for defects in image {len(found) + 1} of {len(trials)}")
        result = model.model(batch.image.to(device))
        values = [
            (result.pred_score if score is None else score(result.anomaly_map)).flatten() for score in ways.values()
        ]
        maps, masks = result.anomaly_map.float().cpu(), batch.gt_mask.unsqueeze(1)
        if maps.shape[-2:] != masks.shape[-2:]:
            maps = interpolate(maps, size=masks.shape[-2:], mode="bilinear")
        for index, path in enumerate(batch.image_path):
            precision = _precision(maps[index], masks[index])
            found.append((by_file[path], precision, [float(way[index]) for way in values]))
    model.cpu()
    return [_outcome(way, found, index, set(left_out)) for index, way in enumerate(ways)]


def _data_of(trials: Sequence[Trial], batch_size: int) -> AnomalibDataModule:
    bad = [trial for trial in trials if trial.mask is not None]
    return data_module(
        [],
        [Path(trial.file) for trial in trials if trial.mask is None],
        [Path(trial.file) for trial in bad],
        masks=[Path(str(trial.mask)) for trial in bad],
        batch_size=batch_size,
    )


def device_of(accelerator: str) -> torch.device:
    """Where a model runs outside a trainer, given Lightning's name of the trainer's accelerator."""
    return torch.device("cuda" if accelerator in {"auto", "gpu", "cuda"} and torch.cuda.is_available() else "cpu")


def _precision(anomaly_map: Tensor, mask: Tensor) -> float:
    return float(binary_average_precision(anomaly_map, mask.long())) if mask.any() else 0.0


def _outcome(way: str | None, found: list[tuple[Trial, float, list[float]]], index: int, left_out: set[str]) -> Outcome:
    good = torch.tensor([values[index] for trial, _, values in found if trial.mask is None])
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_source: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for trial, precision, values in found:
        if trial.kind is None:
            continue
        lower = float((good < values[index]).float().mean() + 0.5 * (good == values[index]).float().mean())
        by_kind[trial.kind].append((lower, precision))
        if trial.kind not in left_out:
            by_source[trial.source].append((lower, precision))
    counted = [pair for kind, pairs in by_kind.items() if kind not in left_out for pair in pairs]
    area, precision = _means(counted)
    quality = {str(source): sum(_means(pairs)) / 2 for source, pairs in sorted(by_source.items())}
    return Outcome(
        way, (area + precision) / 2, area, precision, quality, {kind: _means(pairs) for kind, pairs in by_kind.items()}
    )


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    first, second = torch.tensor(pairs, dtype=torch.float64).mean(dim=0).tolist()
    return first, second


def standard_error(by_source: dict[str, float]) -> float:
    """Standard error over the good images that defects were made of."""
    values = torch.tensor(list(by_source.values()), dtype=torch.float64)
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def is_tie(best: dict[str, float], other: dict[str, float]) -> bool:
    """Whether the difference of two models might come from which images were held out.

    Images are drawn anew with replacement 500 times, the same ones for both; it is a tie where the other model is
    ahead or level in more than one of twenty.

    Args:
        best: Quality by good image, of the model that is ahead.
        other: That of the other model.
    """
    shared = sorted(best.keys() & other.keys())
    difference = torch.tensor([best[source] - other[source] for source in shared], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(shared), (_REDRAWS, len(shared)), generator=generator)
    return bool((difference[draws].mean(dim=1) <= 0).double().mean() > 0.05)


def gflop(model: AnomalibModule, image_size: tuple[int, int]) -> float:
    """Billions of floating-point operations that one image takes, as torch counts them.

    Args:
        model: The model.
        image_size: Height and width of its images.
    """
    image = torch.zeros(1, 3, *image_size, device=next(model.parameters()).device)
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.model(image)
    return float(counter.get_total_flops() / 1e9)


def as_plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data, with its standard error."""
    return {**outcome._asdict(), "standard_error": standard_error(outcome.by_source)}
