# SPDX-License-Identifier: Apache-2.0
"""Anomalies of several kinds in one batch."""

from collections.abc import Sequence

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor
from torchvision.transforms import v2

from anomalib_fractalad.training.random_state import seeded

from .fractal import FractalAnomalyGenerator
from .regions import (
    CutPasteAnomalyGenerator,
    EraseAnomalyGenerator,
    RecolorAnomalyGenerator,
    WarpAnomalyGenerator,
    visible_change,
)


class MixedAnomalyGenerator(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Give each image an anomaly of a kind drawn at random; masks show what can be seen.

    Args:
        generators: Transforms from images ``(B, C, H, W)`` in [0, 1] to anomalous images and masks. Left out, they make
            fractal, Perlin, pasted, warped, erased and recolored regions.

    Raises:
        ValueError: If ``generators`` is empty.
    """

    def __init__(self, generators: Sequence[v2.Transform] | None = None) -> None:
        super().__init__()
        if generators is None:
            # Perlin's generator draws a threshold when it is built. It must be the same in every process.
            with seeded(0):
                perlin = PerlinAnomalyGenerator(probability=1.0)
            generators = (
                FractalAnomalyGenerator(position_margin=0.0, wrap=False),
                perlin,
                CutPasteAnomalyGenerator(),
                WarpAnomalyGenerator(),
                EraseAnomalyGenerator(),
                RecolorAnomalyGenerator(),
            )
        if not generators:
            msg = "generators is empty: at least one transform that makes anomalies is needed."
            raise ValueError(msg)
        self.generators = list(generators)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Make anomalies.

        Args:
            images: Batch ``(B, C, H, W)``, floating point, values in [0, 1].

        Returns:
            Anomalous images ``(B, C, H, W)``, values in [0, 1], and masks ``(B, 1, H, W)``, 1 where the change shows.
        """
        kind = torch.randint(len(self.generators), (len(images),))
        anomalous = images.clone()
        for number, generate in enumerate(self.generators):
            chosen = (kind == number).nonzero().squeeze(1).to(images.device, non_blocking=True)
            if len(chosen):
                anomalous[chosen] = generate(images[chosen])[0].to(images.dtype).clamp(0, 1)
        return anomalous, visible_change(images, anomalous)
