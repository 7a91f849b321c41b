# SPDX-License-Identifier: Apache-2.0
"""How a build's choice by synthetic defects compares with real test images, of data in MVTec's layout.

python studies/choose_by_synthetic_defects.py --roots "[PATH/bottle, PATH/grid]" --output PATH --candidates FILE
"""

import json
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning import seed_everything
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_fractalad.build.candidates import BACKBONE, Candidate, candidates
from anomalib_fractalad.build.evaluation import evaluate, gflop, standard_error
from anomalib_fractalad.build.look import look
from anomalib_fractalad.build.split import data_module, split
from anomalib_fractalad.build.training import train, trainer_length
from anomalib_fractalad.build.trials import make_trials


def choose_by_synthetic_defects(
    roots: list[Path],
    output: Path,
    candidates_file: Path | None = None,
    effort: float = 1.0,
    seed: int = 0,
    backbone: str = BACKBONE,
) -> None:
    """Train each candidate and print its figures on synthetic defects and on real test images.

    Args:
        roots: Data sets: train/good, test/good, test/<defect>, ground_truth/<defect>/<name>.png or <name>_mask.png.
        output: Where checkpoints, synthetic defects and results.json go.
        candidates_file: Candidates in place of the package's.
        effort: Share of whole trainings.
        seed: Seed.
        backbone: Teacher of all candidates.
    """
    results: dict[str, dict[str, dict[str, float]]] = {}
    for root in roots:
        found = look(root / "train/good")
        dealt = split(found, None, seed)
        trials = make_trials(dealt.held, output / root.name / "held", kind=found.kind, count=120, seed=seed)
        pool = candidates(found, {"backbone": backbone}, candidates_file)
        left_out = sorted({kind for candidate in pool for kind in candidate.trains_on})
        rows = results.setdefault(root.name, {})
        for candidate in pool:
            folder = output / root.name / candidate.name.replace(" ", "_")
            seed_everything(seed, workers=True)
            model = candidate.build()
            length = trainer_length(candidate, len(dealt.train), effort)
            train(model, data_module(dealt.train, batch_size=candidate.batch_size), length, folder)
            outcomes = evaluate(model, trials, scores=candidate.scores, left_out=left_out)
            best = max(outcomes, key=lambda outcome: outcome.quality)
            rows[candidate.name] = {
                "gflop": gflop(model, candidate.image_size),
                "synthetic image AUROC": best.image_auroc,
                "synthetic pixel AP": best.pixel_ap,
                "synthetic quality": best.quality,
                "standard error": standard_error(best.by_source),
                **real_figures(model, root, candidate, best.score),
            }
            print(
                root.name,
                candidate.name,
                best.score,
                {name: round(value, 3) for name, value in rows[candidate.name].items()},
                flush=True,
            )
            (output / "results.json").write_text(json.dumps(results, indent=1))


@torch.inference_mode()
def real_figures(model: torch.nn.Module, root: Path, candidate: Candidate, score: str | None) -> dict[str, float]:
    """Image AUROC and pixel AP on real test images, raw maps and scores."""
    from anomalib_fractalad.models.components import ImageScore  # noqa: PLC0415

    good = sorted((root / "test/good").iterdir())
    bad = sorted(file for file in root.glob("test/*/*") if file.parent.name != "good")
    masks = [mask_of(root, file) for file in bad]
    data = data_module([], good, bad, masks=masks, batch_size=candidate.batch_size)
    data.test_augmentations = model.pre_processor.transform
    data.setup()
    scores, labels, maps, truth = [], [], [], []
    reduce = None if score is None else ImageScore(score)
    for batch in data.test_dataloader():
        found = model.model(batch.image)
        scores.append((found.pred_score if reduce is None else reduce(found.anomaly_map)).flatten())
        labels.append(batch.gt_label)
        maps.append(found.anomaly_map.flatten())
        truth.append(batch.gt_mask.flatten())
    all_scores, all_maps = torch.cat(scores), torch.cat(maps)
    return {
        "real image AUROC": float(binary_auroc(rescaled(all_scores), torch.cat(labels).long())),
        "real pixel AP": float(binary_average_precision(rescaled(all_maps), torch.cat(truth).long())),
    }


def rescaled(values: torch.Tensor) -> torch.Tensor:
    """Values in [0, 1] in the same order: torchmetrics would take the sigmoid of others."""
    return (values - values.min()) / (values.max() - values.min())


def mask_of(root: Path, file: Path) -> Path:
    """The mask of a test image."""
    folder = root / "ground_truth" / file.parent.name
    return next(mask for mask in (folder / f"{file.stem}.png", folder / f"{file.stem}_mask.png") if mask.exists())


if __name__ == "__main__":
    auto_cli(choose_by_synthetic_defects, as_positional=False)
