# SPDX-License-Identifier: Apache-2.0
"""Whitened descriptors of places, and a memory of normal ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import at_least_float32, resize


class Descriptor(nn.Module):
    """Standardized features, averaged over 3x3 places, joined at the middle level's stride, whitened and weighed.

    The border, whose features are noise, is damped (see :func:`average`).

    Args:
        channels: Channels of each level.

    Attributes:
        mean: Mean of each channel over normal features, (C,).
        deviation: Standard deviation of each channel, (C,).
        whiten: (C, C), what turns averages into whitened descriptors; it holds the levels' weights, too.
        shift: (C,), what is added after that.
    """

    mean: Tensor
    deviation: Tensor
    whiten: Tensor
    shift: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        total = sum(channels)
        self.channels = list(channels)
        self.register_buffer("mean", torch.zeros(total))
        self.register_buffer("deviation", torch.ones(total))
        self.register_buffer("whiten", torch.eye(total))
        self.register_buffer("shift", torch.zeros(total))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Describe each place of the middle level.

        Args:
            features: (B, C_i, H_i, W_i) for each level, from the finest to the coarsest.

        Returns:
            (B, C, H_1, W_1), C the sum of C_i, of zero mean on normal images; the mean square over all channels is
            about 1.
        """
        means, deviations = (torch.split(values, self.channels) for values in (self.mean, self.deviation))
        standard = [
            (at_least_float32(level) - mean[:, None, None]) / deviation[:, None, None]
            for level, mean, deviation in zip(features, means, deviations, strict=True)
        ]
        return F.linear(average(standard).movedim(1, -1), self.whiten, self.shift).movedim(-1, 1)


def average(features: Sequence[Tensor]) -> Tensor:
    """Average over 3x3 places of the middle level, join the levels, and damp the border, whose features are noise.

    Each place is multiplied by the share of a 3x3 window, at its level's own stride, that lies within the image;
    windows of the fine level are the middle one's. This is what counting the zeros beyond the border does in PatchCore,
    without averages as wide as the coarse level's windows.

    Args:
        features: (B, C_i, H_i, W_i) for the levels of strides 4, 8 and 16.

    Returns:
        (B, C, H_1, W_1), C the sum of C_i.
    """
    size = tuple(features[1].shape[-2:])
    averages = []
    for level, own in zip(features, (features[1], features[1], features[2]), strict=True):
        inside = resize(F.avg_pool2d(torch.ones_like(own[:1, :1]), 3, stride=1, padding=1), size).to(level.dtype)
        mean = F.avg_pool2d(resize(level, size), 3, stride=1, padding=1, count_include_pad=False)
        averages.append(mean * inside)
    return torch.cat(averages, dim=1)


class FeatureMemory(nn.Module):
    """Normal descriptors, and the search for the nearest.

    Args:
        size: Number of items.
        channels: Channels of an item.

    Attributes:
        items: (N, C).
        owners: Number of the owner of each item, (N,).
    """

    items: Tensor
    owners: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(size, channels))
        self.register_buffer("owners", torch.full((size,), -1))

    @torch.no_grad()
    def fill(self, items: Tensor, owners: Tensor) -> None:
        """Replace all items; fewer than the memory's size are repeated.

        Args:
            items: (n, C), at least one and at most N.
            owners: (n,).
        """
        index = torch.arange(len(self.items), device=items.device) % len(items)
        self.items.copy_(items[index])
        self.owners.copy_(owners[index])

    def hide(self, owner: Tensor, share: Tensor) -> Tensor:
        """Choose items to pass over: an image's own, unless all are, and of the others all but a random share.

        Args:
            owner: Numbers (B,) of the images' owners, on any device.
            share: Shares (B,) of the others that are left, on the CPU; at least one item is left.

        Returns:
            Boolean (B, N).
        """
        own = self.owners == owner.to(self.owners.device, non_blocking=True)[:, None]
        own &= ~own.all(dim=1, keepdim=True)
        thinned = own | (torch.rand(own.shape) >= share[:, None]).to(own.device, non_blocking=True)
        return torch.where(thinned.all(dim=1, keepdim=True), own, thinned)

    def forward(self, query: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Find the nearest item to each place.

        Args:
            query: (B, C, H, W).
            hidden: Items that are passed over, boolean (B, N), but not all of an image. Left out, none are.

        Returns:
            The nearest items, (B, C, H, W).
        """
        index = self._compare(query, hidden).argmin(dim=1)
        return F.embedding(index, self.items).permute(0, 3, 1, 2)

    def distance(self, query: Tensor) -> Tensor:
        """Measure how far the nearest item is, without telling which it is: that takes longer than all the rest.

        Args:
            query: (B, C, H, W).

        Returns:
            Root mean square over channels of the difference, (B, 1, H, W).
        """
        squared = self._compare(query).amin(dim=1, keepdim=True) + query.square().sum(dim=1, keepdim=True)
        return (squared / query.shape[1]).clamp(min=1e-12).sqrt()

    def _compare(self, query: Tensor, hidden: Tensor | None = None) -> Tensor:
        """|q - m|^2 without |q|^2, which all items share, (B, N, H, W)."""
        distance = F.conv2d(query, -2 * self.items[..., None, None], self.items.square().sum(dim=1))
        if hidden is not None:
            distance.masked_fill_(hidden[..., None, None], torch.inf)
        return distance
