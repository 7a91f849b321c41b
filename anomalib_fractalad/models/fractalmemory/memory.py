# SPDX-License-Identifier: Apache-2.0
"""Whitened descriptors of places, and a memory of normal ones."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import at_least_float32, resize

FEWEST_ROWS = 4  # of items; with fewer, a search by rows and columns gains nothing


class Descriptor(nn.Module):
    """Standardized features, averaged over 3x3 places, joined at the middle level's stride, whitened and weighed.

    The border, whose features are noise, is damped (see :func:`average`).

    Args:
        channels: Channels of each level.

    Attributes:
        mean: Mean of each channel over normal features, (C,).
        deviation: Standard deviation of each channel, (C,).
        whiten: (C, C), one block for each level: what turns averages into whitened descriptors, scaled by level.
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
            (B, C, H_1, W_1), C the sum of C_i, of zero mean on normal images.
        """
        means, deviations = (by_level(values, self.channels) for values in (self.mean, self.deviation))
        standard = [
            (at_least_float32(level) - mean[:, None, None]) / deviation[:, None, None]
            for level, mean, deviation in zip(features, means, deviations, strict=True)
        ]
        averages = average(standard)
        whitened = self.whiten @ averages.flatten(2) + self.shift[:, None]
        return whitened.reshape(averages.shape)


def by_level(values: Tensor, channels: Sequence[int], dim: int = 0) -> list[Tensor]:
    """Split what a network holds by level. A split of constants makes an export warn that it is not computed ahead.

    Args:
        values: As long in one dimension as all channels together.
        channels: Channels of each level.
        dim: That dimension.

    Returns:
        One part for each level.
    """
    return [values.narrow(dim, end - count, count) for count, end in zip(channels, accumulate(channels), strict=True)]


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
    """Normal descriptors, and the search for the nearest, which each level does for itself.

    Args:
        size: Number of items of each level.
        channels: Channels of each level.

    Attributes:
        items: (N, C), C the sum of all channels. What the levels hold in one row has nothing to do with each other.
        owners: Numbers of the owners of each level's items, (N, S).
    """

    items: Tensor
    owners: Tensor

    def __init__(self, size: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)
        self.register_buffer("items", torch.zeros(size, sum(channels)))
        self.register_buffer("owners", torch.full((size, len(channels)), -1))

    @torch.no_grad()
    def fill(self, items: Tensor, owners: Tensor) -> None:
        """Replace all items; fewer than the memory's size are repeated.

        Args:
            items: (n, C), at least one and at most N.
            owners: (n, S).
        """
        index = torch.arange(len(self.items), device=items.device) % len(items)
        self.items.copy_(items[index])
        self.owners.copy_(owners[index])

    def own(self, owner: Tensor) -> Tensor:
        """Find the items of images' owners; none at a level that has no others.

        Args:
            owner: Numbers (B,) of the images' owners, on any device.

        Returns:
            Boolean (B, N, S).
        """
        own = self.owners == owner.to(self.owners.device, non_blocking=True)[:, None, None]
        return own & ~own.all(dim=1, keepdim=True)

    def hide(self, owner: Tensor, share: Tensor) -> Tensor:
        """Choose items to pass over: an image's own, unless all are, and of the others all but a random share.

        Args:
            owner: Numbers (B,) of the images' owners, on any device.
            share: Shares (B,) of the others that are left, on the CPU; at each level at least one item is left.

        Returns:
            Boolean (B, N, S).
        """
        own = self.own(owner)
        thinned = own | (torch.rand(own.shape) >= share[:, None, None]).to(own.device, non_blocking=True)
        return torch.where(thinned.all(dim=1, keepdim=True), own, thinned)

    def forward(self, query: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Find each level's nearest item to each place.

        Args:
            query: (B, C, H, W).
            hidden: Items that are passed over, boolean (B, N, S), but not all of a level. Left out, none are.

        Returns:
            The nearest items, (B, C, H, W).
        """
        found = []
        for number, (level, items) in enumerate(self._levels(query)):
            distance = _compare(level, items)
            if hidden is None:
                index = _nearest(distance)
            else:  # in training, which is never exported
                index = distance.masked_fill_(hidden[..., number, None, None], torch.inf).argmin(dim=1)
            found.append(F.embedding(index, items).permute(0, 3, 1, 2))
        return torch.cat(found, dim=1)

    def distances(self, query: Tensor) -> Tensor:
        """Measure how far each level's nearest item is, without telling which it is, which takes longer.

        Args:
            query: (B, C, H, W).

        Returns:
            What :meth:`lengths` gives of the difference, (B, S, H, W).
        """
        squares = [
            _compare(level, items).amin(dim=1, keepdim=True) + level.square().sum(dim=1, keepdim=True)
            for level, items in self._levels(query)
        ]
        return self._roots(squares)

    def lengths(self, residual: Tensor) -> Tensor:
        """Measure differences from nearest items, level by level.

        Args:
            residual: (B, C, H, W).

        Returns:
            Root mean square over each level's channels, (B, S, H, W).
        """
        return self._roots([level.square().sum(dim=1, keepdim=True) for level in self._split(residual)])

    def _split(self, maps: Tensor) -> tuple[Tensor, ...]:
        return torch.split(maps, self.channels, dim=1)

    def _levels(self, query: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each level's part of a query, and its items."""
        return list(zip(self._split(query), by_level(self.items, self.channels, dim=1), strict=True))

    def _roots(self, squares: Sequence[Tensor]) -> Tensor:
        means = [square / channels for square, channels in zip(squares, self.channels, strict=True)]
        return torch.cat([mean.clamp(min=1e-12).sqrt() for mean in means], dim=1)


def _compare(query: Tensor, items: Tensor) -> Tensor:
    """|q - m|^2 without |q|^2, which all items share, (B, N, H, W)."""
    return F.conv2d(query, -2 * items[..., None, None], items.square().sum(dim=1))


def _nearest(distance: Tensor) -> Tensor:
    """Which of N items is nearest, (B, H, W); ``distance`` is (B, N, H, W).

    A file for one image is searched by rows. torch is faster without, and in a graph for batches of any size, OpenVINO
    would transpose all distances for it, which takes longer than to search them all.
    """
    count = distance.shape[1]
    rows = max(divisor for divisor in range(1, math.isqrt(count) + 1) if count % divisor == 0)
    static = type(distance.shape[0]) is int
    if torch.compiler.is_exporting() and static and rows >= FEWEST_ROWS:
        return _nearest_by_rows(distance, rows)
    return _first_minimum(distance)


def _nearest_by_rows(distance: Tensor, rows: int) -> Tensor:
    """Which of N items is nearest, any of those that are, (B, H, W); ``distance`` is (B, N, H, W).

    Items are laid out in rows: minima of the columns tell in which column the nearest is, and that column alone is
    searched.
    """
    count = distance.shape[1]
    columns = count // rows
    grid = distance.movedim(1, -1).reshape(-1, rows, columns)
    column = _first_minimum(grid.amin(dim=1))
    top = torch.arange(grid.shape[0], device=distance.device) * count + column
    below = top.unsqueeze(1) + torch.arange(rows, device=distance.device) * columns
    row = _first_minimum(grid.flatten().index_select(0, below.flatten()).reshape(below.shape))
    return (row * columns + column).reshape(distance[:, 0].shape)


def _first_minimum(values: Tensor) -> Tensor:
    """Index of the first minimum along the second dimension of (n, m, ...).

    An argmin takes OpenVINO longer than all the rest, and numbers of another rank than the values twice as long as
    these. Integers keep the index whole in an inference in 16 bits.
    """
    number = torch.arange(values.shape[1], dtype=torch.int32, device=values.device)
    number = number.reshape(1, -1, *[1] * (values.ndim - 2))
    is_minimum = values == values.amin(dim=1, keepdim=True)
    return torch.where(is_minimum, number, values.shape[1] - 1).amin(dim=1)
