# SPDX-License-Identifier: Apache-2.0
"""Scales of the distance and of the head's logit, and how much the head counts, from images that it never saw."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_fractalad.transforms import (
    LightingJitter,
    MixedAnomalyGenerator,
    ScratchAnomalyGenerator,
    SwirlAnomalyGenerator,
)

from .gathering import Gathering
from .torch_model import FractalMemoryModel

QUANTILE = 0.995
LARGEST_SAMPLE = 1_000_000
HEAD_WEIGHTS = (0.0, 0.25)  # more would serve defects made in images, and real ones on some parts only
PIXEL_STEP = 4


@dataclass
class _Sample:
    """An image, compared with a memory without its own part."""

    residual: Tensor
    distance: Tensor
    mask: Tensor


class Calibration:
    """Sets a model's fusion from the images that the gathering has kept aside.

    Scales are the normal images', as they are and in another light. Besides, each image gets a defect of a kind that
    the head is not trained on, and the head counts as much as serves to find these: nothing, where it does more harm
    than good.

    Args:
        gathering: What was gathered.
        lighting: Makes the other light.
    """

    def __init__(self, gathering: Gathering, lighting: LightingJitter) -> None:
        self.lighting = lighting
        self.images = gathering.held_images
        self.owners = gathering.held_owners
        self._normal: list[_Sample] = []
        self._defective: list[_Sample] = []

    @torch.no_grad()
    def __call__(self, model: FractalMemoryModel, *, trained: bool) -> None:
        """Set the scales and weights of a model's fusion.

        Args:
            model: The network, whose memory is filled.
            trained: Whether its head has been trained; if not, it does not count.
        """
        if not self._normal:
            self._prepare(model)
        training = model.head.training
        model.head.eval()
        normal = [_maps(model, sample) for sample in self._normal]
        pixels = torch.cat([both.flatten(1) for both in normal], dim=1)  # (2, N)
        pixels = pixels[:, :: -(-pixels.shape[1] // LARGEST_SAMPLE)]
        center = pixels.median(dim=1).values
        model.fusion.center.copy_(center)
        model.fusion.spread.copy_((pixels.quantile(QUANTILE, dim=1) - center).clamp(min=1e-6))
        share = 0.0
        if trained:
            defective = [_maps(model, sample) for sample in self._defective]
            found = {weight: self._find(model, weight, [*normal, *defective]) for weight in HEAD_WEIGHTS}
            share = max(found, key=lambda weight: found[weight])
        model.fusion.set_head_weight(share)
        model.head.train(training)

    def _prepare(self, model: FractalMemoryModel) -> None:
        """Make defects, always the same, and compare all images with the memory."""
        generator = MixedAnomalyGenerator([ScratchAnomalyGenerator(), SwirlAnomalyGenerator()])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            for stored, owner in zip(self.images, self.owners, strict=True):
                image = stored.to(owner.device).float().unsqueeze(0)
                anomalous, mask = generator(image)
                other_light = [(self._normal, self.lighting(image), torch.zeros_like(mask))] * (
                    self.lighting.strength > 0
                )
                for samples, pixels, truth in (
                    (self._normal, image, torch.zeros_like(mask)),
                    *other_light,
                    (self._defective, anomalous, mask),
                ):
                    samples.append(_Sample(*model.compare(model.teacher(pixels), owner.unsqueeze(0)), truth > 0))
        model.head.typical_distance.copy_(torch.stack([sample.distance.mean() for sample in self._normal]).mean())

    def _find(self, model: FractalMemoryModel, weight: float, maps: list[Tensor]) -> float:
        """How well a fusion finds the defects: the sum of image AUROC and pixel average precision."""
        model.fusion.set_head_weight(weight)
        samples = [*self._normal, *self._defective]
        fused = [model.fusion(both[:1], both[1:]) for both in maps]
        truth = torch.stack([sample.mask.any() for sample in samples]).long()
        if truth.all() or not truth.any():
            return 0.0
        scores = torch.cat([model.score(anomaly_map) for anomaly_map in fused])
        pixels, labels = (
            torch.cat([part[..., ::PIXEL_STEP, ::PIXEL_STEP].flatten() for part in parts])
            for parts in (fused, [sample.mask for sample in samples])
        )
        precision = binary_average_precision(_to_unit(pixels), labels.long())
        return float(binary_auroc(_to_unit(scores), truth) + precision)


def _to_unit(values: Tensor) -> Tensor:
    """Bring values to [0, 1], where torchmetrics takes them as they are."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp(min=1e-12)


def _maps(model: FractalMemoryModel, sample: _Sample) -> Tensor:
    """Smoothed maps of distance and logit, (2, 1, H, W)."""
    both = torch.cat(model.maps(sample.residual, sample.distance))
    return model.smooth_map(model.upsample(both, sample.mask.shape[-2:]))
