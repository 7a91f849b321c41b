# SPDX-License-Identifier: Apache-2.0
"""Iterated function systems: sampling and drawing, batched.

A system is a tensor ``(n, 2, 3)`` of ``n`` affine contractions ``x -> A x + b``, stored as ``[A | b]``. Its attractor
is the set that equals the union of its own images under all maps.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def sample_systems(count: int, maps: int = 2) -> Tensor:
    """Sample random systems of contractions (Anderson and Farrell, WACV 2022, section 3.2).

    Each linear part is rotation-reflection x singular values x rotation-reflection. With ``n`` maps, the weighted sum
    of all singular values ``s1 + 2 * s2`` is uniform in ``[(5 + n) / 2, (6 + n) / 2]``, which keeps attractors neither
    dust nor blobs. Translations are uniform in [-1, 1].

    Args:
        count: Number of systems.
        maps: Number of maps ``n`` in each system, at least 2.

    Returns:
        Systems ``(count, maps, 2, 3)``.

    Raises:
        ValueError: If ``maps`` is less than 2.
    """
    if maps < 2:
        msg = f"maps={maps}: an iterated function system needs at least 2 maps."
        raise ValueError(msg)
    angles = math.pi * (2 * torch.rand(2, count, maps) - 1)
    reflections = 2.0 * torch.randint(2, (2, count, maps, 1, 2)) - 1
    cos, sin = angles.cos(), angles.sin()
    rotations = torch.stack([cos, -sin, sin, cos], dim=-1).reshape(2, count, maps, 2, 2) * reflections
    linear = rotations[0] * _sample_singular_values(count, maps).unsqueeze(-2) @ rotations[1]
    translation = 2 * torch.rand(count, maps, 2, 1) - 1
    return torch.cat([linear, translation], dim=-1)


def _sample_singular_values(count: int, maps: int) -> Tensor:
    """Sample ``(count, maps, 2)`` singular values, descending, one map after the other."""

    def uniform(low: Tensor, high: Tensor) -> Tensor:
        return low + (high - low) * torch.rand(count)

    # What the maps still to come must (low) and may (high) contribute to the weighted sum; a map contributes at most 3.
    high = (5 + maps + torch.rand(count)) / 2
    low = high - 3 * (maps - 1)
    values = []
    for _ in range(maps - 1):
        first = uniform((low / 3).clamp(min=0), high.clamp(max=1))
        low, high = low - first, high - first
        second = uniform((low / 2).clamp(min=0), torch.minimum(first, high / 2))
        low, high = low - 2 * second + 3, high - 2 * second
        values += [first, second]
    second = uniform(((high - 1) / 2).clamp(min=0), high / 3)
    values += [high - 2 * second, second]
    return torch.stack(values, dim=-1).reshape(count, maps, 2)


def attractor_points(systems: Tensor, points: int) -> Tensor:
    """Spread points evenly over the attractors, without randomness.

    The attractor is cut into ``m`` pieces of similar measure, images of itself under compositions of maps, and each
    piece into ``m`` pieces again; every one is represented by its center of mass. All points are one matrix product.
    The measure is that of the random walk which draws each map with probability proportional to ``|det A|``.

    Args:
        systems: Systems ``(B, n, 2, 3)``.
        points: Number of points wanted.

    Returns:
        First and second coordinates ``(B, 2, N)`` of at least ``points`` points of each attractor.
    """
    determinants = torch.linalg.det(systems[..., :2]).abs()
    probabilities = determinants / determinants.sum(1, keepdim=True)
    pieces = _cut(systems, probabilities, math.ceil(math.sqrt(points)))
    linear, translation = pieces[..., :2], pieces[..., 2:]
    mean_map = (probabilities[..., None, None] * systems).sum(1)
    identity = torch.eye(2, dtype=systems.dtype, device=systems.device)
    # Without a check of the result, which would wait for an accelerator.
    center, _ = torch.linalg.solve_ex(identity - mean_map[..., :2], mean_map[..., 2:])
    centers = (linear @ center.unsqueeze(1) + translation).squeeze(-1)
    # (B, 2m, 2) @ (B, 2, m): the first coordinates of all points, then the second ones.
    coordinates = torch.bmm(linear.transpose(1, 2).flatten(1, 2), centers.transpose(1, 2))
    return coordinates.add_(translation.transpose(1, 2).flatten(1, 2)).reshape(len(systems), 2, -1)


def _cut(systems: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Compose maps until the attractor is the union of its images under ``(B, m, 2, 3)`` words, ``m >= count``."""
    maps = systems.shape[1]
    words, measures = systems, probabilities
    while (present := words.shape[1]) < count:
        split = min(math.ceil(present / 8), math.ceil((count - present) / (maps - 1)))
        largest = measures.topk(split, dim=1).indices
        places = largest[..., None, None].expand(-1, -1, 2, 3)
        parents = words.gather(1, places).unsqueeze(2)
        children = parents[..., :2] @ systems.unsqueeze(1)
        children[..., 2] += parents[..., 2]
        words = torch.cat([words.scatter(1, places, children[:, :, 0]), children[:, :, 1:].flatten(1, 2)], dim=1)
        shares = measures.gather(1, largest).unsqueeze(2) * probabilities.unsqueeze(1)
        measures = torch.cat([measures.scatter(1, largest, shares[..., 0]), shares[..., 1:].flatten(1)], dim=1)
    return words


def draw(systems: Tensor, sizes: Tensor, stamps: Tensor | None = None, points: int = 100_000) -> Tensor:
    """Draw attractors as binary images.

    Args:
        systems: Systems ``(B, n, 2, 3)``.
        sizes: Side in pixels ``(B,)`` of each image; the attractor's bounding box is scaled to it.
        stamps: Binary 3x3 patterns ``(B, 3, 3)``, set around every point and cut off at the side. ``None`` sets the
            point's own pixel.
        points: Number of points of each attractor.

    Returns:
        Boolean images ``(B, S, S)``, row = first coordinate, with ``S`` the largest size; smaller images lie in the
        top left corner.
    """
    side = int(sizes.max())
    sizes = sizes.to(systems.device, non_blocking=True)
    coordinates = attractor_points(systems, points)
    low, high = coordinates.amin(-1, keepdim=True), coordinates.amax(-1, keepdim=True)
    precision = torch.finfo(coordinates.dtype)
    # A little more than to scale, lest rounding puts the farthest points before the last row.
    scale = (1 + 2 * precision.eps) * (sizes[:, None, None] - 1) / (high - low).clamp_(min=precision.tiny)
    # uint8 because torch's bool operations are not vectorized.
    images = torch.zeros(len(systems), side**2, dtype=torch.uint8, device=systems.device)
    # A part at a time stays in the processor's cache.
    for part in torch.split(coordinates, 4096, dim=-1):
        rows, columns = ((part - low) * scale).unbind(1)
        images.scatter_(1, rows.floor_().mul_(side).add_(columns).long(), 1)
    images = images.reshape(-1, side, side)
    if stamps is not None:
        images = _stamp(images, stamps.to(systems.device, non_blocking=True))
        inside = (torch.arange(side, device=systems.device) < sizes[:, None]).to(images.dtype)
        images.mul_(inside[:, :, None]).mul_(inside[:, None, :])
    return images.view(torch.bool)


def _stamp(images: Tensor, stamps: Tensor) -> Tensor:
    """Set a pixel's neighbors that its image's 3x3 pattern names, for every pixel that is set."""
    side = images.shape[-1]
    padded = pad(images, (1, 1, 1, 1))
    stamps = stamps.to(images.dtype)
    stamped = torch.zeros_like(images)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, 2 - row : 2 - row + side, 2 - column : 2 - column + side]
            stamped |= shifted & stamps[:, row, column, None, None]
    return stamped
