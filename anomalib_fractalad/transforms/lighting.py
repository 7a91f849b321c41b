# SPDX-License-Identifier: Apache-2.0
"""Changes in lighting and camera that are no anomaly."""

import torch
from torch import Tensor
from torchvision.transforms import v2


class LightingJitter(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Change contrast, brightness and tint of whole images a little, and add noise to half of them.

    Args:
        strength: Factor on all changes; 1 is contrast up to 20 %, brightness up to 0.1, tint up to 4 %, and the noise.
        noise: Largest standard deviation of the noise; at 0 there is none.

    Raises:
        ValueError: If ``strength`` or ``noise`` is negative.
    """

    def __init__(self, strength: float = 1.0, noise: float = 0.015) -> None:
        super().__init__()
        for name, value in (("strength", strength), ("noise", noise)):
            if value < 0:
                msg = f"{name}={value}: it must be 0 or more."
                raise ValueError(msg)
        self.strength = strength
        self.noise = noise

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Change images.

        Args:
            images: Batch ``(B, C, H, W)``, floating point, values in [0, 1].

        Returns:
            ``(B, C, H, W)``, values in [0, 1].
        """
        return self.apply(images, self.generate_parameters(images))

    def generate_parameters(self, images: Tensor) -> dict[str, Tensor]:
        """Draw all random numbers for a batch.

        Args:
            images: Images ``(B, C, H, W)``; only their shape counts.

        Returns:
            ``contrast`` and ``brightness`` (B, 1, 1, 1), ``tint`` (B, C, 1, 1) and ``noise`` (B, C, H, W).
        """
        count, channels = images.shape[:2]

        def draw(most: float, *shape: int) -> Tensor:
            return most * self.strength * (2 * torch.rand(count, *shape) - 1)

        amount = self.noise * self.strength * torch.rand(count, 1, 1, 1) * (torch.rand(count, 1, 1, 1) < 0.5)
        return {
            "contrast": 1 + draw(0.2, 1, 1, 1),
            "brightness": draw(0.1, 1, 1, 1),
            "tint": 1 + draw(0.04, channels, 1, 1),
            "noise": amount * torch.randn(images.shape),
        }

    def apply(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Make the changes that the parameters describe.

        Args:
            images: Images ``(B, C, H, W)``.
            parameters: What :meth:`generate_parameters` returned for images of this shape.

        Returns:
            ``(B, C, H, W)``, values in [0, 1].
        """
        given = {name: value.to(images, non_blocking=True) for name, value in parameters.items()}
        changed = ((images - 0.5) * given["contrast"] + 0.5) * given["tint"] + given["brightness"] + given["noise"]
        return changed.clamp(0, 1)
