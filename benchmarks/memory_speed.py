# SPDX-License-Identifier: Apache-2.0
"""How long FractalMemory takes to choose its items, beside measuring every candidate each time.

Run as ``python benchmarks/memory_speed.py``.
"""

from time import perf_counter

import torch
from jsonargparse import auto_cli
from torch import Tensor

from anomalib_fractalad.benchmark.surroundings import cpu_threads
from anomalib_fractalad.models.fractalmemory.statistics import farthest_from


def memory_speed(
    candidates: int = 320_000, channels: int = 40, items: int = 2000, threads: int = 1
) -> dict[str, float]:
    """Print how long both take to choose the same items of one level, in one run.

    Candidates are normally distributed, as whitened descriptors nearly are.

    Args:
        candidates: Number of candidates.
        channels: Channels of the level.
        items: Number of items to choose.
        threads: Number of CPU threads.

    Returns:
        Seconds of both, and which share of the items both choose.
    """
    points = torch.randn(candidates, channels, generator=torch.Generator().manual_seed(0))
    first = torch.tensor(0)
    with cpu_threads(threads):
        start = perf_counter()
        chosen = farthest_from(first, points, items)
        middle = perf_counter()
        expected = one_by_one(first, points, items)
        end = perf_counter()
    same = torch.isin(chosen, expected).float().mean().item()
    results = {"choice_s": middle - start, "one by one_s": end - middle, "same": same}
    print(f"{items} of {candidates} candidates with {channels} channels, {threads} CPU thread(s)")
    print(
        f"{results['choice_s']:.1f} s, one by one {results['one by one_s']:.1f} s; {same:.2%} of the items are the same"
    )
    print(f"{results['one by one_s'] / results['choice_s']:.1f} x as fast")
    return results


def one_by_one(first: Tensor, points: Tensor, count: int) -> Tensor:
    """Choose what :func:`farthest_from` chooses, of the same arguments, by measuring all points each time."""
    squares = points.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)
    chosen = [first]
    while len(chosen) < count:
        latest = chosen[-1]
        distance = torch.addmv(squares + squares[latest], points, points[latest], alpha=-2)
        nearest = torch.minimum(nearest, distance)
        nearest[latest] = -torch.inf
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


if __name__ == "__main__":
    auto_cli(memory_speed, as_positional=False)
