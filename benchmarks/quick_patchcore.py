# SPDX-License-Identifier: Apache-2.0
"""anomalib's PatchCore with a given number of items, whose greedy choice takes minutes on a CPU, not hours.

The choice is PatchCore's own, farthest point first over all features of all training images. It is made on the
features themselves, not on anomalib's random projections of them, which have more channels than the features of a small
backbone. Everything else is anomalib's. In the config of a comparison it is ``quick_patchcore.QuickPatchcore``, with
this folder on ``PYTHONPATH``.
"""

from typing import Any

import torch
from anomalib.models import Patchcore

from anomalib_fractalad.models.fractalmemory.statistics import farthest_from


class QuickPatchcore(Patchcore):
    """PatchCore with a memory of so many items.

    Args:
        items: Number of items of the memory, all features where there are fewer; or, below 1, which share of these.
        **arguments: Those of anomalib's PatchCore.
    """

    def __init__(self, items: float = 10_000, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.items = items

    def fit(self) -> None:
        """Choose the memory from the features of all training images."""
        features = torch.vstack(self.model.embedding_store)
        self.model.embedding_store.clear()
        count = min(int(self.items if self.items >= 1 else self.items * len(features)), len(features))
        self.model.memory_bank = features[farthest_from(torch.randint(len(features), ()), features, count)]
