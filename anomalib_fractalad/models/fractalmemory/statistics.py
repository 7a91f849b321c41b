# SPDX-License-Identifier: Apache-2.0
"""Moments and samples of normal features, bounded however many there are, and what is made of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import check_count, check_positive

from .memory import Descriptor, FeatureMemory, average

REGULARIZATION = 0.03  # added to the variances, which are 1 before averaging
LEVELS = 3
COARSE_SHARE = 4  # a place of the coarse level is as large as four of the others
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
    if reservoir_size < COARSE_SHARE * memory_size:
        msg = (
            f"reservoir_size is {reservoir_size}; it must be at least {COARSE_SHARE} times memory_size, "
            f"which is {memory_size}: the coarse level chooses from a quarter as many places"
        )
        raise ValueError(msg)


class Moments(nn.Module):
    """Running means and covariances of a level, exact whatever the batches.

    Standardizing needs the mean of each channel, which is known only at the end. So averages are gathered of features
    as they are, and of ones, which tell how much of each 3x3 window lies within the image.

    Args:
        channels: Channels of the level.

    Attributes:
        count: Places of the features, ().
        total: Sum of each channel, (C,).
        squares: Sum of the squares of each channel, (C,).
        places: Number of averages, ().
        sum: Sum of the averages of all channels and of the ones, (C + 1,).
        products: Sum of their products, (C + 1, C + 1).
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    places: Tensor
    sum: Tensor
    products: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, shape in {
            "count": (),
            "total": (channels,),
            "squares": (channels,),
            "places": (),
            "sum": (channels + 1,),
            "products": (channels + 1, channels + 1),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def update(self, features: Tensor, averages: Tensor, inside: Tensor | None = None) -> None:
        """Take in normal features.

        Args:
            features: (B, C, H, W).
            averages: What :func:`extended_average` makes of them.
            inside: Pixels of the images that count, boolean (B, 1, H', W'). Left out, all count.
        """
        rows = places(features, inside).double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.squares += rows.square().sum(dim=0)
        rows = places(averages, inside).double()
        self.places += len(rows)
        self.sum += rows.sum(dim=0)
        self.products += rows.mT @ rows

    def fit(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Standardization and whitening, in double precision.

        Returns:
            Mean and standard deviation of each channel, (C,) each; the matrix that whitens averages of standardized
            features, (C, C), and what is added after that, (C,).
        """
        mean = self.total / self.count
        # Channels that a ReLU has silenced everywhere stay as they are.
        deviation = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        deviation = torch.where(deviation > 1e-6 * (1 + mean.abs()), deviation, 1)
        standardize = _standardization(mean, deviation)
        center = self.sum / self.places
        covariance = self.products / self.places - torch.outer(center, center)
        whiten = _whitening(standardize @ covariance @ standardize.mT)
        return mean, deviation, whiten, -whiten @ standardize @ center


def _standardization(mean: Tensor, deviation: Tensor) -> Tensor:
    """(C, C + 1), what standardizes averages, behind which lie those of ones."""
    return torch.cat([torch.diag(1 / deviation), -(mean / deviation).unsqueeze(1)], dim=1)


def fit_descriptor(descriptor: Descriptor, moments: Sequence[Moments]) -> list[Tensor]:
    """Set a descriptor's standardization, and the whitening of each level by itself.

    Args:
        descriptor: Where the results are stored.
        moments: Those of each level.

    Returns:
        (C_i, C_i + 2) for each level: the affine map from extended averages and a 1 to whitened descriptors.
    """
    fitted = [level.fit() for level in moments]
    means, deviations, whitenings, shifts = zip(*fitted, strict=True)
    descriptor.mean.copy_(torch.cat(means))
    descriptor.deviation.copy_(torch.cat(deviations))
    descriptor.whiten.copy_(torch.block_diag(*whitenings))  # type: ignore[no-untyped-call]
    descriptor.shift.copy_(torch.cat(shifts))
    return [
        torch.cat([whiten @ _standardization(mean, deviation), shift.unsqueeze(1)], dim=1).float()
        for mean, deviation, whiten, shift in fitted
    ]


def _whitening(covariance: Tensor) -> Tensor:
    """The lower triangular matrix that whitens features of a covariance (C, C), with some variance added."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factor = torch.linalg.cholesky(covariance + REGULARIZATION * identity)
    whitening: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return whitening


class Reservoir(nn.Module):
    """A uniform sample of all places of a level, of constant size (reservoir sampling: Vitter, 1985, algorithm R).

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
        # Zeros of numpy take no memory until they are written.
        self.register_buffer("values", torch.from_numpy(np.zeros((size, channels), np.float32)))
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


def extended_average(features: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`average` makes of features, and behind their channels what it makes of ones.

    Args:
        features: (B, C_i, H_i, W_i) for the levels of strides 4, 8 and 16.

    Returns:
        (B, C_i + 1, h_i, w_i) for each level.
    """
    ones = average([torch.ones_like(level[:1, :1]) for level in features])
    return [
        torch.cat([level, one.expand(len(level), -1, -1, -1)], dim=1)
        for level, one in zip(average(features), ones, strict=True)
    ]


def fill_memory(
    memory: FeatureMemory,
    descriptor: Descriptor,
    moments: Sequence[Moments],
    samples: Sequence[tuple[Tensor, Tensor]],
    level_weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Set a descriptor, fill a memory with the candidates that lie farthest from each other, and scale both by level.

    Args:
        memory: The memory.
        descriptor: The descriptor.
        moments: What the descriptor is made of, for each level.
        samples: Extended averages of each level's candidates, (n_i, C_i + 1), and numbers of their owners, (n_i,).
        level_weights: As for :func:`level_scales`.

    Returns:
        What each level's distance is at a usual normal place, and how far that of a rare one lies beyond it, (S,) each.
    """
    size, levels, ranges = len(memory.items), [], []
    for affine, (values, owners) in zip(fit_descriptor(descriptor, moments), samples, strict=True):
        candidates = F.linear(values, affine[:, :-1], affine[:, -1])
        chosen = farthest_points(candidates, min(size, len(candidates)))
        level = FeatureMemory(size, [candidates.shape[1]]).to(candidates)
        level.fill([candidates[chosen]], [owners[chosen]])
        levels.append(level)
        ranges.append(normal_range(level, candidates, owners))
    usual, spread = torch.stack(ranges, dim=1)
    scales = level_scales(usual, spread, level_weights)
    memory.fill(
        [level.items * scale for level, scale in zip(levels, scales, strict=True)],
        [level.owners.squeeze(1) for level in levels],
    )
    factors = scales.repeat_interleave(torch.tensor(memory.channels, device=scales.device)).to(descriptor.whiten)
    descriptor.whiten *= factors.unsqueeze(1)
    descriptor.shift *= factors
    return scales * usual, scales * spread


def normal_range(level: FeatureMemory, candidates: Tensor, owners: Tensor) -> Tensor:
    """How far normal places lie from a memory without their own image, or, if there is no other, from all of it.

    Args:
        level: The memory of a level, filled.
        candidates: Descriptors of normal places, (n, C).
        owners: Numbers of their owners, (n,).

    Returns:
        The median, and how far the 99.5 % quantile lies beyond it, (2,).
    """
    rows = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(0))[:COMPARED].to(owners.device)
    distances = []
    for part in torch.split(rows, max(COMPARISONS // len(level.items), 1)):
        residual = level.residual(level.split(candidates[part]), level.own(owners[part]))
        distances.append(level.lengths(residual).flatten())
    distance = torch.cat(distances)
    usual, rare = (torch.quantile(distance, share).clamp(min=SMALLEST_DISTANCE) for share in (0.5, RARE))
    return torch.stack([usual, (rare - usual).clamp(min=SMALLEST_DISTANCE)])


def level_scales(usual: Tensor, spread: Tensor, level_weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Factors that make the levels' distances comparable.

    A level's distance is divided by its range over normal places, from the median to the 99.5 % quantile. All are
    multiplied so that the sum of the medians is 1.

    Args:
        usual: The medians, (S,).
        spread: The ranges, (S,).
        level_weights: What the levels count after that.

    Returns:
        (S,).
    """
    scales = spread.new_tensor(level_weights) / spread
    return scales / (scales * usual).sum()


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
