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
    """Standardized features, averaged over 3x3 places of the middle level's stride, whitened and weighed by level.

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

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Describe the places of each level.

        Args:
            features: (B, C_i, H_i, W_i) for each level, from the finest to the coarsest.

        Returns:
            What :func:`average` gives, whitened: (B, C_i, h_i, w_i) for each level, of zero mean on normal images.
        """
        means, deviations, shifts = (by_level(v, self.channels) for v in (self.mean, self.deviation, self.shift))
        standard = [
            (at_least_float32(level) - mean[:, None, None]) / deviation[:, None, None]
            for level, mean, deviation in zip(features, means, deviations, strict=True)
        ]
        whitenings = diagonal_blocks(self.whiten, self.channels)
        return [
            (whiten @ level.flatten(2) + shift[:, None]).reshape(level.shape)
            for level, whiten, shift in zip(average(standard), whitenings, shifts, strict=True)
        ]


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


def diagonal_blocks(matrix: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Take each level's own block out of a matrix.

    Args:
        matrix: (C, C), C the sum of all channels.
        channels: Channels of each level.

    Returns:
        (C_i, C_i) for each level.
    """
    return [by_level(rows, channels, dim=1)[i] for i, rows in enumerate(by_level(matrix, channels))]


def average(features: Sequence[Tensor]) -> list[Tensor]:
    """Average over 3x3 places of the middle level's stride, and damp the border, whose features are noise.

    The coarse level keeps its own stride: one of its places gets the mean of the four that lie in it at the middle
    level's. Each place is multiplied by the share of a 3x3 window, at its level's own stride, that lies within the
    image; windows of the fine level are the middle one's. This is what counting the zeros beyond the border does in
    PatchCore, without averages as wide as the coarse level's windows.

    Args:
        features: (B, C_i, H_i, W_i) for the levels of strides 4, 8 and 16.

    Returns:
        (B, C_0, H_1, W_1), (B, C_1, H_1, W_1), (B, C_2, H_2, W_2).
    """
    fine, middle, coarse = features
    doubled = resize(coarse, [2 * side for side in coarse.shape[-2:]])
    means = [_mean(resize(fine, middle.shape[-2:])), _mean(middle), F.avg_pool2d(_mean(doubled), 2)]
    return [mean * _inside(mean) for mean in means]


def _mean(level: Tensor) -> Tensor:
    return F.avg_pool2d(level, 3, stride=1, padding=1, count_include_pad=False)


def _inside(level: Tensor) -> Tensor:
    """The share of each 3x3 window that lies within the image, (1, 1, H, W)."""
    return F.avg_pool2d(torch.ones_like(level[:1, :1]), 3, stride=1, padding=1)


def join(levels: Sequence[Tensor]) -> Tensor:
    """Join levels at the middle level's places; those of the coarse level, the last, are repeated.

    Args:
        levels: What :func:`average` gives.

    Returns:
        (B, C, H_1, W_1), C the sum of C_i.
    """
    *finer, coarse = levels
    height, width = finer[0].shape[-2:]
    repeated = coarse.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    return torch.cat([*finer, repeated[..., :height, :width]], dim=1)


def align(levels: Sequence[Tensor]) -> Tensor:
    """Join levels at the middle level's size; the coarse level, the last, is resized.

    Args:
        levels: (B, c_i, h_i, w_i) for each level.

    Returns:
        (B, c, h_0, w_0), c the sum of c_i.
    """
    *finer, coarse = levels
    return torch.cat([*finer, resize(coarse, levels[0].shape[-2:])], dim=1)


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

    def forward(self, query: Sequence[Tensor], hidden: Tensor | None = None) -> list[Tensor]:
        """Find each level's nearest item to each of its places.

        Args:
            query: (B, C_i, H_i, W_i) for each level.
            hidden: Items that are passed over, boolean (B, N, S), but not all of a level. Left out, none are.

        Returns:
            The nearest items, (B, C_i, H_i, W_i) for each level.
        """
        found = []
        for number, (level, items) in enumerate(self._levels(query)):
            distance = _compare(level, items)
            if hidden is None:
                index = _nearest(distance)
            else:  # in training, which is never exported
                index = distance.masked_fill_(hidden[..., number, None, None], torch.inf).argmin(dim=1)
            found.append(F.embedding(index, items).permute(0, 3, 1, 2))
        return found

    def residual(self, query: Sequence[Tensor], hidden: Tensor | None = None) -> list[Tensor]:
        """Subtract what :meth:`forward` finds.

        Args:
            query: (B, C_i, H_i, W_i) for each level.
            hidden: As for :meth:`forward`.

        Returns:
            (B, C_i, H_i, W_i) for each level.
        """
        return [level - item for level, item in zip(query, self(query, hidden), strict=True)]

    def distances(self, query: Sequence[Tensor]) -> Tensor:
        """Measure how far each level's nearest item is, without telling which it is, which takes longer.

        Args:
            query: (B, C_i, H_i, W_i) for each level.

        Returns:
            What :meth:`lengths` gives of the differences, (B, S, H_1, W_1).
        """
        squares = [
            _compare(level, items).amin(dim=1, keepdim=True) + level.square().sum(dim=1, keepdim=True)
            for level, items in self._levels(query)
        ]
        return self._roots(squares)

    def lengths(self, residual: Sequence[Tensor]) -> Tensor:
        """Measure differences from nearest items, level by level.

        Args:
            residual: (B, C_i, H_i, W_i) for each level.

        Returns:
            Root mean square over each level's channels, at the middle level's size, (B, S, H_1, W_1).
        """
        return self._roots([level.square().sum(dim=1, keepdim=True) for level in residual])

    def split(self, places: Tensor) -> list[Tensor]:
        """Split places that have all levels.

        Args:
            places: (n, C).

        Returns:
            Queries of single places, (n, C_i, 1, 1) for each level.
        """
        return by_level(places[..., None, None], self.channels, dim=1)

    def _levels(self, query: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Each level of a query, and its items."""
        return list(zip(query, by_level(self.items, self.channels, dim=1), strict=True))

    def _roots(self, squares: Sequence[Tensor]) -> Tensor:
        means = [square / channels for square, channels in zip(squares, self.channels, strict=True)]
        return align([mean.clamp(min=1e-12).sqrt() for mean in means])


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
