# SPDX-License-Identifier: Apache-2.0
"""Validation on synthetic anomalies of a generator of one's choice; anomalib's own makes Perlin anomalies alone."""

import random
from typing import Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.data.utils.split import random_split
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from torch import nn

from anomalib_fractalad.repairs.replacing import replaced
from anomalib_fractalad.transforms import FractalAnomalyGenerator


class SyntheticValidation(AnomalibDataModule):
    """Another data module, whose validation images are training images, half of them with synthetic anomalies.

    anomalib's ``val_split_mode: synthetic`` does this with Perlin anomalies, and lets no other generator be chosen.
    This takes any data module and generator, for any model. The other module's own validation is not used. On
    anomalib's command line it is ``--data anomalib_fractalad.data.SyntheticValidation``, with ``--data.data`` for the
    other one.

    Args:
        data: The other data module.
        generator: Makes anomalies of an image (3, H, W), values in [0, 1], and gives them with their mask (1, H, W).
            Left out, it is FractalAnomalyGenerator.
        val_split_ratio: Share of the training images that validate, above 0 and below 1; they are not trained on.
        seed: Seed of who validates and of the anomalies. Left out, both change.

    Raises:
        ValueError: If the share is out of range.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> data = SyntheticValidation(MVTecAD(category="grid"), val_split_ratio=0.2)  # doctest: +SKIP
    """

    def __init__(
        self,
        data: AnomalibDataModule,
        generator: nn.Module | None = None,
        val_split_ratio: float = 0.2,
        seed: int | None = None,
    ) -> None:
        if not 0 < val_split_ratio < 1:
            msg = f"val_split_ratio is {val_split_ratio}; it must be above 0 and below 1"
            raise ValueError(msg)
        super().__init__(
            train_batch_size=data.train_batch_size,
            eval_batch_size=data.eval_batch_size,
            num_workers=data.num_workers,
            train_augmentations=data.train_augmentations,
            val_augmentations=data.val_augmentations,
            test_augmentations=data.test_augmentations,
            val_split_mode=ValSplitMode.SYNTHETIC,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.data = data
        self.generator = generator or FractalAnomalyGenerator()

    @property
    def name(self) -> str:  # type: ignore[override]
        """The other data module's name."""
        return str(self.data.name)

    def prepare_data(self) -> None:
        """Let the other data module prepare its data."""
        self.data.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        self.data.val_split_mode = ValSplitMode.NONE
        self.data.setup(_stage)
        self.train_data, self.test_data = self.data.train_data, self.data.test_data

    def _create_test_split(self) -> None:
        """The test images are the other data module's."""

    def _create_val_split(self) -> None:
        self.train_data, good = random_split(self.train_data, self.val_split_ratio, seed=self.seed)
        before = random.getstate(), np.random.get_state()  # noqa: NPY002  # pandas draws from it
        with torch.random.fork_rng(), replaced("anomalib.data.utils.synthetic", "PerlinAnomalyGenerator", self._made):
            if self.seed is not None:
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed)  # noqa: NPY002
            self.val_data = SyntheticAnomalyDataset.from_dataset(good)
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002

    def _made(self, *_args: Any, **_options: Any) -> nn.Module:
        return self.generator
