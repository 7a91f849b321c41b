# SPDX-License-Identifier: Apache-2.0
"""Whether the head has a vote in the map, by images that it never saw."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from anomalib_fractalad.training.random_state import seeded
from anomalib_fractalad.transforms import (
    LightingJitter,
    MixedAnomalyGenerator,
    ScratchAnomalyGenerator,
    SwirlAnomalyGenerator,
)

from .gathering import Gathering
from .torch_model import FractalMemoryModel

WEIGHTS = (0.0, 1.0)  # more would serve made defects, and not real ones everywhere
PIXEL_STEP = 4


@dataclass
class _Sample:
    """An image, compared with a memory without its own part."""

    residual: Tensor
    distances: Tensor
    mask: Tensor


class Calibration:
    """Sets what the vote of a model's head counts by the images that the gathering has kept aside.

    Each gets a defect of a kind that the head is not trained on, as it is and in another light. The weight is the one
    that finds these best among all the pixels: 0, where the head does more harm than good.

    Args:
        gathering: What was gathered.
    """

    def __init__(self, gathering: Gathering) -> None:
        self.lighting = LightingJitter()
        self.images = gathering.held_images
        self.owners = gathering.held_owners
        self._samples: list[_Sample] = []

    @torch.no_grad()
    def __call__(self, model: FractalMemoryModel, *, trained: bool) -> None:
        """Set what the vote of a model's head counts.

        Args:
            model: The network, which has a head and whose memory is filled.
            trained: Whether its head has been trained; if not, it does not count.
        """
        head = model.trained_head
        if not self._samples:
            self._prepare(model)
        model.vote.weight.zero_()
        if not trained or not any(sample.mask.any() for sample in self._samples):
            return
        training = head.training
        head.eval()
        precision = {weight: self._precision(model, weight) for weight in WEIGHTS}
        model.vote.weight.fill_(max(precision, key=lambda weight: precision[weight]))
        head.train(training)

    def _prepare(self, model: FractalMemoryModel) -> None:
        """Make defects, always the same, and compare all images with the memory."""
        generator = MixedAnomalyGenerator([ScratchAnomalyGenerator(), SwirlAnomalyGenerator()])
        with seeded(0):
            for stored, owner in zip(self.images, self.owners, strict=True):
                image = stored.to(model.memory.items.device).float().unsqueeze(0)
                hidden = model.memory.hide(owner.unsqueeze(0), torch.ones(1))
                for light in (image, self.lighting(image)):
                    anomalous, mask = generator(light)
                    for pixels, truth in ((light, torch.zeros_like(mask)), (anomalous, mask)):
                        self._samples.append(_Sample(*model.compare(model.teacher(pixels), hidden), truth > 0))

    def _precision(self, model: FractalMemoryModel, weight: float) -> float:
        """Average precision of pixels with a vote of this weight."""
        model.vote.weight.fill_(weight)
        maps = torch.cat([model.refined_map(s.residual, s.distances, s.mask.shape[-2:])[1] for s in self._samples])
        masks = torch.cat([sample.mask for sample in self._samples])
        pixels, truth = (part[..., ::PIXEL_STEP, ::PIXEL_STEP].flatten() for part in (maps, masks))
        return float(binary_average_precision(pixels, truth.long()))
