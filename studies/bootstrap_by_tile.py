# SPDX-License-Identifier: Apache-2.0
"""How sure a difference between two models on the magnetic tiles is: image AUROC with tiles drawn anew.

python studies/bootstrap_by_tile.py --records "[a/jobs/x.json, b/jobs/y.json]"
"""

import json
from pathlib import Path

import numpy as np
from common import by_tile
from jsonargparse import auto_cli
from torch import Tensor, tensor
from torchmetrics.functional.classification import binary_auroc


def bootstrap_by_tile(records: tuple[Path, Path], gap: int = 100, draws: int = 2000) -> tuple[float, float, float]:
    """Print both image AUROCs, and their difference with its 95 % interval over draws of whole tiles.

    Args:
        records: Records of two jobs of the comparison, in its output's ``jobs``, with the same test images.
        gap: Photographs whose numbers lie further apart are of different tiles, normal and defective ones apart.
        draws: Number of draws.

    Returns:
        The difference and the bounds of its interval.
    """
    first, second = (scores(record) for record in records)
    if first.keys() != second.keys():
        msg = f"{records[0]} and {records[1]} are of different test images"
        raise ValueError(msg)
    tiles = []
    for anomalous in (False, True):
        names = [Path(name) for name, (label, _) in first.items() if label == anomalous]
        tiles.append(
            [np.array([(anomalous, first[str(n)][1], second[str(n)][1]) for n in g]) for g in by_tile(names, gap)]
        )
    print(f"{len(tiles[0])} groups of normal photographs, {len(tiles[1])} of defective ones")
    areas = both_areas([np.concatenate(kind) for kind in tiles])
    random = np.random.default_rng(0)
    drawn = [
        both_areas([np.concatenate([kind[i] for i in random.integers(len(kind), size=len(kind))]) for kind in tiles])
        for _ in range(draws)
    ]
    low, high = np.percentile([a - b for a, b in drawn], [2.5, 97.5])
    print(f"{areas[0]:.3f} and {areas[1]:.3f}; difference {areas[0] - areas[1]:.3f}, 95 % from {low:.3f} to {high:.3f}")
    return areas[0] - areas[1], float(low), float(high)


def scores(record: Path) -> dict[str, tuple[bool, float]]:
    """Label and score of each test image."""
    return {name: (label, score) for name, label, score in json.loads(record.read_text())["scores"]}


def both_areas(kinds: list[np.ndarray]) -> tuple[float, float]:
    """Image AUROC of two models; rows of label and both scores."""
    rows: Tensor = tensor(np.concatenate(kinds))
    first, second = (float(binary_auroc(rows[:, column], rows[:, 0].long())) for column in (1, 2))
    return first, second


if __name__ == "__main__":
    auto_cli(bootstrap_by_tile, as_positional=False)
