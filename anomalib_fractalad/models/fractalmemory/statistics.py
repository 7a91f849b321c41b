# SPDX-License-Identifier: Apache-2.0
"""Moments and samples of normal features, bounded however many there are, and what is made of them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import check_count, check_positive

from .memory import Descriptor, FeatureMemory, average, diagonal_blocks, join

REGULARIZATION = 0.03  # added to the variances, which are 1 before averaging
LEVELS = 3
PROJECTION = 64  # dimensions that distances between candidates are measured in
COMPARED = 10_000  # candidates that tell how far normal places lie from the memory
COMPARISONS = 2_000_000  # at once
FAR = 20  # this share of the points is farthest
FEWEST_FAR = 1000
RARE = 0.995  # the share of normal places that are nearer than what counts as rare
SMALLEST_DISTANCE = 0.05  # of whitened descriptors; what never varies would otherwise drown all else


def check_level_weights(level_weights: Sequence[float] | None) -> None:
    """Refuse weights that are not three finite numbers above zero.

    Args:
        level_weights: Weights of the levels at strides 4, 8 and 16.

    Raises:
        ValueError: If they are not.
    """
    if level_weights is None or len(level_weights) != LEVELS:
        msg = f"level_weights is {level_weights!r}; it must hold {LEVELS} numbers, for strides 4, 8 and 16"
        raise ValueError(msg)
    check_positive(**{f"level_weights[{i}]": weight for i, weight in enumerate(level_weights)})


def check_sizes(memory_size: int, reservoir_size: int) -> None:
    """Refuse a memory larger than what it is chosen from.

    Args:
        memory_size: Number of items.
        reservoir_size: Number of candidates.

    Raises:
        ValueError: If so, or if one is no whole number above zero.
    """
    check_count(memory_size=memory_size, reservoir_size=reservoir_size)
    if reservoir_size < memory_size:
        msg = (
            f"memory_size is {memory_size}, and reservoir_size {reservoir_size}, which items are chosen from: give "
            f"memory_size {reservoir_size} at most, or a larger reservoir_size"
        )
        raise ValueError(msg)


class Moments(nn.Module):
    """Running means and covariances, exact whatever the batches.

    Standardizing needs the mean of each channel, which is known only at the end. So averages are gathered of features
    as they are, and of ones, which tell how much of each 3x3 window lies within the image.

    Args:
        channels: Channels of each level.

    Attributes:
        count: Places at each level, (S,).
        total: Sum of each channel, (C,).
        squares: Sum of the squares of each channel, (C,).
        places: Number of averages, ().
        sum: Sum of the averages of all channels and of the ones of each level, (C + S,).
        products: Sum of their products, (C + S, C + S).
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    places: Tensor
    sum: Tensor
    products: Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = list(channels)
        levels, length = len(channels), sum(channels)
        for name, shape in {
            "count": (levels,),
            "total": (length,),
            "squares": (length,),
            "places": (),
            "sum": (length + levels,),
            "products": (length + levels, length + levels),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def update(self, features: Sequence[Tensor], averages: Tensor, inside: Tensor | None = None) -> None:
        """Take in normal features.

        Args:
            features: (B, C_i, H_i, W_i) for each level.
            averages: What :func:`extended_average` makes of them.
            inside: Pixels of the images that count, boolean (B, 1, H, W). Left out, all count.
        """
        levels = [places(level, inside).double() for level in features]
        for i, level in enumerate(levels):
            self.count[i] += len(level)
        self.total += torch.cat([level.sum(dim=0) for level in levels])
        self.squares += torch.cat([level.square().sum(dim=0) for level in levels])
        rows = places(averages, inside).double()
        self.places += len(rows)
        self.sum += rows.sum(dim=0)
        self.products += rows.mT @ rows

    def fit(self, descriptor: Descriptor) -> Tensor:
        """Set a descriptor's standardization, and the whitening of each level by itself.

        Args:
            descriptor: Where the results are stored.

        Returns:
            (C, C + S + 1), the affine map from extended averages and a 1 to whitened descriptors.
        """
        count = self.count.repeat_interleave(torch.tensor(self.channels, device=self.count.device))
        mean = self.total / count
        # Channels that a ReLU has silenced everywhere stay as they are.
        deviation = (self.squares / count - mean.square()).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1)
        level = torch.arange(len(self.channels), device=mean.device)
        own = level.repeat_interleave(torch.tensor(self.channels, device=mean.device)).unsqueeze(1) == level
        standardize = torch.cat([torch.diag(1 / deviation), -(mean / deviation)[:, None] * own], dim=1)
        center = self.sum / self.places
        covariance = self.products / self.places - torch.outer(center, center)
        covariance = standardize @ covariance @ standardize.mT
        blocks = diagonal_blocks(covariance, self.channels)
        whiten = torch.block_diag(*map(_whitening, blocks))  # type: ignore[no-untyped-call]
        shift = -whiten @ standardize @ center
        for buffer, value in (
            (descriptor.mean, mean),
            (descriptor.deviation, deviation),
            (descriptor.whiten, whiten),
            (descriptor.shift, shift),
        ):
            buffer.copy_(value)
        return torch.cat([whiten @ standardize, shift[:, None]], dim=1).float()


def _whitening(covariance: Tensor) -> Tensor:
    """The lower triangular matrix that whitens features of a covariance (C, C), with some variance added."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + REGULARIZATION * identity)
    whitening: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return whitening


class Reservoir(nn.Module):
    """A uniform sample of all places, of constant size (reservoir sampling: Vitter, 1985, algorithm R).

    Args:
        size: Number of places.
        channels: Channels of a place.

    Attributes:
        values: (N, C).
        owners: Number of the owner of each place, (N,).
        seen: Number of places that were offered, ().
    """

    values: Tensor
    owners: Tensor
    seen: Tensor

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(size, channels))
        self.register_buffer("owners", torch.full((size,), -1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def offer(self, averages: Tensor, owner: Tensor, inside: Tensor | None = None) -> None:
        """Offer all places of a batch, without waiting for an accelerator if all count.

        Args:
            averages: (B, C, H, W).
            owner: Numbers of the images' owners, (B,), on any device.
            inside: Pixels of the images that count, boolean (B, 1, H', W'). Left out, all count.
        """
        size, device = len(self.values), self.values.device
        rows = places(averages, inside).to(self.values.dtype)
        owner = owner.to(device, non_blocking=True)[:, None, None, None]
        owners = places(owner.expand(-1, 1, *averages.shape[-2:]), inside).squeeze(1)
        row = torch.arange(len(rows), device=device)
        number = self.seen + row
        # The place of this number stays with probability size / (number + 1), in a slot at random.
        drawn = torch.rand(len(rows), dtype=torch.float64).to(device, non_blocking=True)
        slot = torch.where(number < size, number, (drawn * (number + 1)).long())
        stays = slot < size
        slot = torch.where(stays, slot, 0)
        # Of several rows for a slot the last stays, and all write that one: in no order is another left. Rows that stay
        # nowhere write what slot 0 gets, too, or else what it holds.
        last = row.new_full((size,), -1).scatter_reduce(0, slot, torch.where(stays, row, -1), "amax")
        written = last[slot]
        self.values[slot] = torch.cat([rows, self.values[:1]])[written]
        self.owners[slot] = torch.cat([owners, self.owners[:1]])[written]
        self.seen += len(rows)

    @property
    def sample(self) -> tuple[Tensor, Tensor]:
        """Values and owners that there are."""
        count = min(int(self.seen), len(self.values))
        return self.values[:count], self.owners[:count]


def places(maps: Tensor, inside: Tensor | None = None) -> Tensor:
    """The places of maps in one list.

    Args:
        maps: (B, C, h, w).
        inside: Pixels that count, boolean (B, 1, H, W); of the places, those that lie in them by half, or, if none of
            the batch does, by as much as any. Left out, all places.

    Returns:
        (n, C).
    """
    rows = maps.movedim(1, -1)
    if inside is None:
        return rows.flatten(0, 2)
    share = F.interpolate(inside.float(), size=maps.shape[-2:], mode="area").squeeze(1)
    return rows[(share > 0) & (share >= share.amax().clamp(max=0.5))]


def extended_average(features: Sequence[Tensor]) -> Tensor:
    """Averages of features, and of ones at each level, at the middle level's places.

    Args:
        features: (B, C_i, H_i, W_i) for the levels of strides 4, 8 and 16.

    Returns:
        (B, C + S, H_1, W_1), the ones behind all channels.
    """
    ones = join(average([torch.ones_like(level[:1, :1]) for level in features]))
    averages = join(average(features))
    return torch.cat([averages, ones.expand(len(averages), -1, -1, -1)], dim=1)


def fill_memory(
    memory: FeatureMemory,
    descriptor: Descriptor,
    moments: Moments,
    values: Tensor,
    owners: Tensor,
    level_weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Set a descriptor, fill a memory with the candidates that lie farthest from each other, and scale both by level.

    Args:
        memory: The memory.
        descriptor: The descriptor.
        moments: What the descriptor is made of.
        values: Extended averages of the candidates, (n, C + S).
        owners: Numbers of their owners, (n,).
        level_weights: As for :func:`level_scales`.

    Returns:
        What each level's distance is at a usual normal place, and how far that of a rare one lies beyond it, (S,) each.
    """
    affine = moments.fit(descriptor)
    candidates = F.linear(values, affine[:, :-1], affine[:, -1])
    count = min(len(memory.items), len(candidates))
    levels = torch.split(candidates, memory.channels, dim=1)
    chosen = [farthest_points(level, count) for level in levels]
    items = torch.cat([level[rows] for level, rows in zip(levels, chosen, strict=True)], dim=1)
    memory.fill(items, torch.stack([owners[rows] for rows in chosen], dim=1))
    scales, usual, spread = level_scales(
        memory, candidates.to(memory.items), owners.to(memory.items.device), level_weights
    )
    factors = scales.repeat_interleave(torch.tensor(memory.channels, device=scales.device))
    memory.items *= factors
    descriptor.whiten *= factors.unsqueeze(1)
    descriptor.shift *= factors
    return scales * usual, scales * spread


def level_scales(
    memory: FeatureMemory, candidates: Tensor, owners: Tensor, level_weights: Sequence[float] = (1.0, 1.0, 1.0)
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors that make the levels' distances comparable.

    A level's distance is divided by its range over normal places, from the median to the 99.5 % quantile. All are
    multiplied so that the sum of the medians is 1. The places are compared with a memory without their own image, or,
    if there is no other, with all of it.

    Args:
        memory: The memory, filled.
        candidates: Descriptors of normal places, (n, C).
        owners: Numbers of their owners, (n,).
        level_weights: What the levels count after that.

    Returns:
        The factors, the medians and the ranges, these without the factors, (S,) each.
    """
    rows = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:COMPARED].to(owners.device)
    distances = []
    for part in torch.split(rows, max(COMPARISONS // len(memory.items), 1)):
        residual = memory.residual(memory.split(candidates[part]), memory.own(owners[part]))
        distances.append(memory.lengths(residual).flatten(1))
    distance = torch.cat(distances)
    usual, rare = (torch.quantile(distance, share, dim=0).clamp(min=SMALLEST_DISTANCE) for share in (0.5, RARE))
    spread = (rare - usual).clamp(min=SMALLEST_DISTANCE)
    scales = distance.new_tensor(level_weights) / spread
    return scales / (scales * usual).sum(), usual, spread


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Choose points, each farthest from all those before; the first is the one farthest from the mean.

    Distances are measured in a random projection (Johnson and Lindenstrauss), the same at every call.

    Args:
        points: (n, C).
        count: Number of points to choose, at most n.

    Returns:
        Indices of the chosen points, (count,).
    """
    generator = torch.Generator().manual_seed(0)
    if points.shape[1] > PROJECTION:
        projection = torch.randn(points.shape[1], PROJECTION, generator=generator) / PROJECTION**0.5
        points = points @ projection.to(points)
    return farthest_from((points - points.mean(dim=0)).square().sum(dim=1).argmax(), points, count)


def farthest_from(first: Tensor, points: Tensor, count: int) -> Tensor:
    """Choose points, each farthest from all those before.

    Distances only fall. So as long as one of the points that were farthest at last count is no nearer than all others
    were then, it is the next, and the others need not be measured.

    Args:
        first: Index of the first, ().
        points: (n, C).
        count: Number of points to choose, at most n.

    Returns:
        Indices of the chosen points, (count,).
    """
    nearest = points.new_full((len(points),), torch.inf)
    chosen = latest = first.reshape(1)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, _nearest_squares(points, points[latest]))
        nearest[chosen] = -torch.inf  # never again, whatever rounding says
        bounds, far = nearest.topk(min(max(len(points) // FAR, FEWEST_FAR), len(points)))
        latest = far[_farthest_of_far(bounds, points[far], count - len(chosen))]
        chosen = torch.cat([chosen, latest])
    return chosen


def _farthest_of_far(nearest: Tensor, points: Tensor, most: int) -> Tensor:
    """Choose points, each farthest from those before, as long as none is farther that is not among them.

    Args:
        nearest: Squares of each point's distance from what was chosen before, (n,), falling. Others have no more than
            the last.
        points: (n, C).
        most: Number of points to choose at most; one is chosen at least.

    Returns:
        Indices of the chosen points, (m,).
    """
    squares, others = points.square().sum(dim=1), nearest[-1]
    chosen: list[Tensor] = []
    while not chosen or (len(chosen) < most and not nearest.max() < others):
        latest = nearest.argmax()
        chosen.append(latest)
        nearest = torch.minimum(nearest, torch.addmv(squares + squares[latest], points, points[latest], alpha=-2))
        nearest[latest] = -torch.inf
    return torch.stack(chosen)


def _nearest_squares(points: Tensor, items: Tensor) -> Tensor:
    """Square of each point's distance from the nearest of some items, (n,)."""
    squares = items.square().sum(dim=1)
    parts = torch.split(points, max(COMPARISONS // len(items), 1))
    return torch.cat(
        [torch.addmm(squares, part, items.T, alpha=-2).amin(dim=1) + part.square().sum(dim=1) for part in parts]
    )
