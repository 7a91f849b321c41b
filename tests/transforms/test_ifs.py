# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_fractalad.transforms.ifs import attractor_points, draw, sample_systems

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ifs.npz")


def random_walk(system: Tensor, points: int) -> Tensor:
    """Points (2, N) of the walk that draws each map with probability proportional to |det A|, one step at a time."""
    probabilities = torch.linalg.det(system[:, :, :2]).abs()
    point = torch.zeros(2, dtype=system.dtype)
    visited = []
    for index in torch.multinomial(probabilities, points + 50, replacement=True).tolist():
        point = system[index, :, :2] @ point + system[index, :, 2]
        visited.append(point)
    return torch.stack(visited[50:], dim=1)


@pytest.mark.parametrize(("number", "least"), [(0, 0.85), (1, 0.85), (2, 0.85), (3, 0.85), (4, 0.35)])
def test_attractors_agree_with_the_golden_ones(number: int, least: float) -> None:
    system = torch.from_numpy(GOLDEN[f"system{number}"])
    golden = torch.from_numpy(np.unpackbits(GOLDEN[f"attractor{number}"]).reshape(128, 128)).bool()
    for dtype in (torch.float32, torch.float64):
        image = draw(system[None].to(dtype), torch.tensor([128]))[0]
        assert (image & golden).sum() / (image | golden).sum() >= least


def test_batch_draws_each_system_at_its_own_size() -> None:
    systems = torch.stack([torch.from_numpy(GOLDEN[f"system{number}"]).float() for number in range(3)])
    sizes = torch.tensor([40, 64, 17])
    stamps = torch.randint(2, (3, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.bool)
    images = draw(systems, sizes, stamps, points=4000)
    assert images.shape == (3, 64, 64)
    assert images.dtype == torch.bool
    for system, size, stamp, image in zip(systems, sizes, stamps, images, strict=True):
        alone = draw(system[None], size[None], stamp[None], points=4000)[0]
        assert torch.equal(image[:size, :size], alone)
        assert image.sum() == alone.sum()


def test_stamp_sets_the_pattern_around_every_point() -> None:
    system = torch.from_numpy(GOLDEN["system1"]).float()[None]
    stamp = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
    plain = draw(system, torch.tensor([48]), points=2000)[0]
    expected = torch.zeros_like(plain)
    for row, column in plain.nonzero().tolist():
        for i, j in stamp.nonzero().tolist():
            target = row + i - 1, column + j - 1
            if 0 <= target[0] < 48 and 0 <= target[1] < 48:
                expected[target] = True
    assert torch.equal(draw(system, torch.tensor([48]), stamp[None], points=2000)[0], expected)


def test_bounding_box_fills_the_image() -> None:
    torch.manual_seed(0)
    images = draw(sample_systems(20), torch.full((20,), 32))
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        assert edge.any(-1).all()


@pytest.mark.parametrize("maps", [2, 3])
def test_points_lie_where_a_random_walk_goes(maps: int) -> None:
    torch.manual_seed(1)
    system = sample_systems(1, maps).double()[0]
    points = attractor_points(system[None], 900)[0]
    assert points.shape[0] == 2
    assert points.shape[1] >= 900
    walk = random_walk(system, 4000)
    extent = (walk.amax(1) - walk.amin(1)).max()
    distance = torch.cdist(points.T, walk.T)
    assert distance.amin(1).mean() < 0.01 * extent
    assert distance.amin(0).mean() < 0.02 * extent


def test_same_system_same_drawing() -> None:
    torch.manual_seed(0)
    systems = sample_systems(4)
    first = draw(systems, torch.full((4,), 50))
    torch.rand(7)
    assert torch.equal(first, draw(systems, torch.full((4,), 50)))


def test_sampled_singular_values() -> None:
    torch.manual_seed(0)
    systems = sample_systems(20_000)
    assert systems.shape == (20_000, 2, 2, 3)
    values = torch.linalg.svdvals(systems[..., :2])
    assert values.max() <= 1 + 1e-5
    total = (values @ torch.tensor([1.0, 2.0])).sum(1)
    assert total.min() >= 3.5 - 1e-4
    assert total.max() <= 4.0 + 1e-4
    assert total.mean() == pytest.approx(3.75, abs=0.01)
    torch.testing.assert_close(values.mean(0), torch.tensor([[0.625, 0.355], [0.902, 0.757]]), atol=0.01, rtol=0)
    assert systems[..., 2].min() >= -1
    assert systems[..., 2].max() <= 1
    assert systems[..., 2].std() == pytest.approx(3**-0.5, abs=0.01)
    assert (torch.linalg.det(systems[..., :2]) < 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_fill_of_sampled_attractors() -> None:
    torch.manual_seed(0)
    stamps = torch.randint(2, (500, 3, 3), dtype=torch.bool)
    fill = draw(sample_systems(500), torch.full((500,), 64), stamps, points=4096).float().mean(dim=(1, 2))
    quantiles = fill.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(quantiles, torch.tensor([0.18, 0.30, 0.41, 0.54, 0.72]), rtol=0.2, atol=0)


def test_one_map_is_refused() -> None:
    with pytest.raises(ValueError, match="maps=1"):
        sample_systems(3, maps=1)
