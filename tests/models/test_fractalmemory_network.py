# SPDX-License-Identifier: Apache-2.0
"""FractalMemory's network, and what its first stage gathers."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.components import ImageScore
from anomalib_fractalad.models.fractalmemory import FractalMemory, FractalMemoryModel
from anomalib_fractalad.models.fractalmemory.gathering import MOST_HELD, Gathering
from anomalib_fractalad.models.fractalmemory.head import BoundedVote, ResidualHead
from anomalib_fractalad.models.fractalmemory.loss import SegmentationLoss
from anomalib_fractalad.models.fractalmemory.memory import Descriptor, FeatureMemory, _nearest, _nearest_by_rows
from anomalib_fractalad.models.fractalmemory.saturation import Saturation
from anomalib_fractalad.models.fractalmemory.stages import Stage, StagePlan
from anomalib_fractalad.models.fractalmemory.statistics import (
    REGULARIZATION,
    SMALLEST_DISTANCE,
    Moments,
    Reservoir,
    check_level_weights,
    extended_average,
    farthest_points,
    level_scales,
    places,
)

CHANNELS = [2, 3, 4]


def random_features(images: int) -> list[torch.Tensor]:
    stages = zip(CHANNELS, (16, 8, 4), strict=True)
    mixed = [torch.randn(images, channels, side, side) for channels, side in stages]
    return [torch.einsum("bchw,cd->bdhw", stage, torch.randn(len(stage[0]), len(stage[0]))) + 5 for stage in mixed]


def test_descriptors_are_whitened_averages_of_standardized_features() -> None:
    features = random_features(6)
    moments, descriptor = Moments(CHANNELS), Descriptor(CHANNELS)
    for part in (slice(0, 2), slice(2, 6)):
        batch = [stage[part] for stage in features]
        moments.update(batch, extended_average(batch))
    affine = moments.fit(descriptor)

    # A second way: all at once, in double precision, by an eigendecomposition.
    standard = []
    for stage in features:
        values = stage.double()
        mean, deviation = values.mean((0, 2, 3), keepdim=True), values.std((0, 2, 3), correction=0, keepdim=True)
        standard.append((values - mean) / deviation)
    inside = F.avg_pool2d(torch.ones(1, 1, 8, 8, dtype=torch.float64), 3, 1, 1)
    wide = F.avg_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), 3, 1, 1)
    pooled = [
        F.avg_pool2d(F.avg_pool2d(standard[0], 2), 3, 1, 1),
        F.avg_pool2d(standard[1], 3, 1, 1),
        F.avg_pool2d(F.avg_pool2d(F.interpolate(standard[2], size=(8, 8), mode="bilinear"), 3, 1, 1) / inside, 2)
        * wide,
    ]
    described = descriptor(features)
    for level, place in zip(pooled, described, strict=True):
        found = place.movedim(1, -1).flatten(0, 2)
        rows = level.movedim(1, -1).flatten(0, 2)
        rows = rows - rows.mean(0)
        covariance = rows.mT @ rows / len(rows) + REGULARIZATION * torch.eye(rows.shape[1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
        expected = torch.cdist(rows @ root, rows @ root)  # whitenings differ by a rotation
        torch.testing.assert_close(torch.cdist(found.double(), found.double()), expected, atol=1e-4, rtol=1e-4)
    joined = torch.cat([*described[:2], F.interpolate(described[2], size=(8, 8))], dim=1).movedim(1, -1)
    torch.testing.assert_close(joined.mean((0, 1, 2)), torch.zeros(9), atol=1e-4, rtol=0)
    averages = extended_average(features).movedim(1, -1)
    torch.testing.assert_close(F.linear(averages, affine[:, :-1], affine[:, -1]), joined, atol=1e-3, rtol=1e-3)


def test_levels_are_scaled_by_their_range_over_normal_places_and_weighed() -> None:
    candidates, owners = torch.randn(90, 9) * torch.tensor([1.0] * 2 + [3.0] * 3 + [10.0] * 4), torch.arange(90) % 6
    memory = FeatureMemory(90, CHANNELS)
    memory.fill(candidates, owners[:, None].expand(-1, 3))
    scales, usual, spread = level_scales(memory, candidates, owners, (4.0, 2.0, 1.0))
    others = torch.where(owners[:, None] == owners, torch.inf, 0)
    medians, ranges = [], []
    for level in torch.split(candidates, CHANNELS, dim=1):
        nearest = (torch.cdist(level, level) + others).amin(dim=1) / level.shape[1] ** 0.5
        medians.append(nearest.quantile(0.5))
        ranges.append(nearest.quantile(0.995) - medians[-1])
    expected = torch.tensor([4.0, 2.0, 1.0]) / torch.stack(ranges)
    expected /= expected @ torch.stack(medians)
    for found, second_way in ((scales, expected), (usual, torch.stack(medians)), (spread, torch.stack(ranges))):
        torch.testing.assert_close(found, second_way, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("images", [1, 2])
def test_normal_places_that_are_all_alike_are_no_fault(images: int) -> None:
    candidates, owners = torch.ones(20, 9), torch.arange(20) % images
    memory = FeatureMemory(10, CHANNELS)
    memory.fill(candidates[:10], owners[:10, None].expand(-1, 3))
    scales, _, _ = level_scales(memory, candidates, owners)
    torch.testing.assert_close(scales, torch.full((3,), 1 / (3 * SMALLEST_DISTANCE)))


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (1.0, 0.0, 1.0), (1.0, float("nan"), 1.0)])
def test_wrong_level_weights_are_named(weights: tuple[float, ...] | None) -> None:
    with pytest.raises(ValueError, match="level_weights"):
        check_level_weights(weights)
    check_level_weights((4.0, 2.0, 1.0))


def test_what_lies_outside_a_region_is_not_gathered() -> None:
    features = random_features(2)
    inside = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    inside[0, :, :, 32:], inside[1, :, 16:48, 32:] = True, True
    other = [level.clone() for level in features]
    for level in other:
        level[..., : level.shape[-1] // 2] = 7
    gathered = []
    for levels in (features, other):
        moments, reservoir = Moments(CHANNELS), Reservoir(96, 9)
        averages = torch.cat(
            [F.interpolate(level, size=(8, 8)) for level in levels], dim=1
        )  # without the neighbors that averages take in
        extended = torch.cat([averages, torch.ones(2, 3, 8, 8)], dim=1)
        moments.update(levels, extended, inside)
        reservoir.offer(averages, torch.tensor([5, 6]), inside)
        gathered.append((moments.state_dict(), reservoir.state_dict()))
    for ours, theirs in zip(*gathered, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
    assert moments.places == 8 * 4 + 4 * 4
    assert moments.count.tolist() == [16 * 8 + 8 * 8, 8 * 4 + 4 * 4, 4 * 2 + 2 * 2]
    values, owners = reservoir.sample
    assert owners.tolist() == [5] * 32 + [6] * 16
    torch.testing.assert_close(values[:4], averages[0, :, 0, 4:].mT)


def test_copies_of_images_are_gathered_and_not_held() -> None:
    images, copies, owner = torch.rand(9, 3, 8, 8), torch.rand(9, 3, 8, 8), torch.arange(9)
    features = {id(part): [level.float() for level in random_features(9)] for part in (images, copies)}
    gathering = Gathering(CHANNELS, 5000, torch.device("cpu"))
    gathering.add(lambda part: features[id(part)], images, owner)
    gathering.add(lambda part: features[id(part)], copies, owner, copies=True)
    assert gathering.images == 9
    assert gathering.held_owners.tolist() == [0, 8]
    assert all(torch.equal(held, images[i].half()) for held, i in zip(gathering.held_images, (0, 8), strict=True))
    both = [torch.cat(levels) for levels in zip(*features.values(), strict=True)]
    whole = Gathering(CHANNELS, 5000, torch.device("cpu"))
    whole.add(lambda _: both, torch.cat([images, copies]), owner.repeat(2))
    for name, value in whole.moments.state_dict().items():
        torch.testing.assert_close(gathering.moments.state_dict()[name], value)
    torch.testing.assert_close(*(part.reservoir.sample[0].sort(dim=0).values for part in (gathering, whole)))
    assert torch.equal(*(part.reservoir.sample[1].sort().values for part in (gathering, whole)))


def test_another_size_of_the_reservoir_is_named_on_resuming() -> None:
    state = Gathering(CHANNELS, 20, torch.device("cpu")).states()[0]
    with pytest.raises(ValueError, match="reservoir_size is 30 here, and 20 in the checkpoint: go on with 20"):
        Gathering(CHANNELS, 30, torch.device("cpu")).load(state)


def test_a_region_smaller_than_a_place_still_counts() -> None:
    inside = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    inside[..., 9, 17:20] = True
    row = places(torch.arange(64.0).view(1, 1, 8, 8), inside)
    assert row.tolist() == [[10.0]]


def test_a_silent_channel_is_no_fault() -> None:
    features = [torch.zeros_like(stage) for stage in random_features(2)]
    moments, descriptor = Moments(CHANNELS), Descriptor(CHANNELS)
    moments.update(features, extended_average(features))
    assert moments.fit(descriptor).isfinite().all()
    assert torch.cat([level.flatten() for level in descriptor(features)]).abs().max() < 1e-6


@pytest.mark.parametrize(("channels", "count"), [(5, 300), (100, 300), (5, 3000), (100, 3000)])  # fewer than 1000, more
def test_points_are_chosen_farthest_first(channels: int, count: int) -> None:
    points = torch.randn(count, channels)
    projected = points
    if channels > 64:
        projection = torch.randn(channels, 64, generator=torch.Generator().manual_seed(0)) / 8
        projected = points @ projection
    chosen = [int((projected - projected.mean(0)).norm(dim=1).argmax())]
    for _ in range(199):
        chosen.append(int(torch.cdist(projected, projected[chosen]).amin(1).argmax()))
    assert farthest_points(points, 200).tolist() == chosen


@pytest.mark.parametrize("count", [5, 1500])
def test_equal_points_are_chosen_once_each(count: int) -> None:
    assert sorted(farthest_points(torch.ones(count, 3), count).tolist()) == list(range(count))


def test_the_nearest_item_is_the_one_that_cdist_finds_without_the_image_itself() -> None:
    memory = FeatureMemory(50, CHANNELS)
    items, owners = torch.randn(50, 9), torch.stack([torch.randperm(50) % 5 for _ in CHANNELS], dim=1)
    memory.fill(items, owners)
    query = [torch.randn(3, CHANNELS[0], 4, 6), torch.randn(3, CHANNELS[1], 4, 6), torch.randn(3, CHANNELS[2], 2, 3)]
    everything = memory(query)
    hidden = memory.hide(torch.tensor([4, 0, 77]), torch.ones(3))
    without = memory(query, hidden)
    levels = zip(query, everything, without, torch.split(items, CHANNELS, dim=1), strict=True)
    for number, (level, found, others_found, level_items) in enumerate(levels):
        rows = level.movedim(1, -1)
        nearest = level_items[torch.cdist(rows.flatten(0, 2), level_items).argmin(1)]
        torch.testing.assert_close(found.movedim(1, -1), nearest.view_as(rows))
        for image, owner in enumerate((4, 0, 77)):
            others = level_items[owners[:, number] != owner]
            nearest = others[torch.cdist(rows[image].flatten(0, 1), others).argmin(1)]
            torch.testing.assert_close(others_found[image].movedim(0, -1).flatten(0, 1), nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (293, 1), (300, 15), (2000, 40)])
def test_of_items_that_are_equally_near_the_first_is_taken(count: int, rows: int, dtype: torch.dtype) -> None:
    distance = torch.randint(0, 5, (3, count, 4, 6)).to(dtype) - 2
    distance[:, 0, 0] = -3  # the first and the last
    distance[:, -1, 1] = -3
    distance[0, 5:] = torch.inf
    assert torch.equal(_nearest(distance).long(), distance.argmin(dim=1))
    # By rows, one of them is.
    found = _nearest_by_rows(distance, rows)
    assert found.shape == (3, 4, 6)
    assert torch.equal(distance.gather(1, found.long().unsqueeze(1)).squeeze(1), distance.amin(dim=1))
    assert (found[:, 0] == 0).all()
    assert (found[1:, 1] == count - 1).all()


def test_a_random_share_of_the_others_is_left() -> None:
    memory = FeatureMemory(4000, [1, 1])
    memory.fill(torch.randn(4000, 2), torch.stack([torch.arange(4000) % 2, torch.arange(4000) % 4], dim=1))
    hidden = memory.hide(torch.tensor([0, 1, 5]), torch.tensor([0.5, 0.1, 0.0]))
    for image, owner in enumerate((0, 1, 5)):
        assert hidden[image][memory.owners == owner].all()
    left = (~hidden).float().mean(dim=1)
    expected = torch.tensor([[0.25, 0.5 * 0.75], [0.05, 0.1 * 0.75]])
    torch.testing.assert_close(left[:2], expected, atol=0.03, rtol=0)
    assert left[2].tolist() == [1, 1]  # a share of nothing is none


def test_an_image_that_owns_all_of_a_level_is_compared_with_it() -> None:
    memory = FeatureMemory(7, [1, 1])
    memory.fill(torch.randn(3, 2), torch.tensor([[1, 1], [1, 2], [1, 1]]))
    hidden = memory.hide(torch.tensor([1]), torch.ones(1))
    assert not hidden[..., 0].any()
    assert hidden[0, :, 1].tolist() == [True, False, True, True, False, True, True]
    assert all(level.isfinite().all() for level in memory([torch.randn(1, 1, 2, 2)] * 2, hidden))
    assert len(memory.items.unique(dim=0)) == 3  # few items are repeated


def test_a_reservoir_is_an_even_sample_of_constant_size() -> None:
    counts = torch.zeros(40)
    for _ in range(300):
        reservoir = Reservoir(10, 1)
        for image in range(0, 10, 2):
            places = torch.arange(4 * image, 4 * image + 8.0).view(2, 1, 2, 2)
            reservoir.offer(places, torch.tensor([image, image + 1]))
        values, owners = reservoir.sample
        assert values.shape == (10, 1)
        assert values.unique().numel() == 10
        assert torch.equal(values.squeeze(1).long() // 4, owners)
        counts[values.squeeze(1).long()] += 1
    # 75 on average, with a standard deviation of 7.5.
    assert counts.min() > 40
    assert counts.max() < 110
    few = Reservoir(10, 1)
    few.offer(torch.ones(1, 1, 2, 2), torch.tensor([3]))
    assert [len(part) for part in few.sample] == [4, 4]


def test_a_reservoir_holds_what_one_place_after_another_leaves() -> None:
    reservoir = Reservoir(20, 2)
    held: dict[int, tuple[list[float], int]] = {}
    for batch in range(30):
        averages, owner = torch.randn(2, 2, 3, 3), torch.tensor([2 * batch, 2 * batch + 1])
        state = torch.get_rng_state()
        reservoir.offer(averages, owner)
        torch.set_rng_state(state)
        draws = torch.rand(18, dtype=torch.float64)
        for i, place in enumerate(averages.movedim(1, -1).flatten(0, 2).tolist()):
            seen = 18 * batch + i
            slot = seen if seen < 20 else int(draws[i] * (seen + 1))
            if slot < 20:
                held[slot] = (place, int(owner[i // 9]))
        values, owners = reservoir.sample
        assert [*zip(values.tolist(), owners.tolist(), strict=True)] == [held[slot] for slot in sorted(held)]


def test_gathering_does_not_depend_on_what_the_device_holds() -> None:
    # Tensors of this device hold no values: whatever reads one, as a wait for an accelerator does, raises.
    features = [torch.rand(2, c, side, side, device="meta") for c, side in zip(CHANNELS, (16, 8, 4), strict=True)]
    moments, reservoir = Moments(CHANNELS).to("meta"), Reservoir(20, 12).to("meta")
    averages = extended_average(features)
    moments.update(features, averages)
    reservoir.offer(averages, torch.tensor([1, 2]))
    assert reservoir.values.shape == (20, 12)


def teacher(images: torch.Tensor) -> list[torch.Tensor]:
    return [F.avg_pool2d(images, stride).repeat(1, 3, 1, 1)[:, :8] for stride in (4, 8, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_memory_holds_the_places_farthest_from_each_other_and_whose_they_are(dtype: torch.dtype) -> None:
    images, owner = torch.rand(6, 3, 32, 48), torch.tensor([5, 5, 3, 2, 1, 0])
    network = SimpleNamespace(
        memory=FeatureMemory(30, [8, 8, 8]), descriptor=Descriptor([8, 8, 8]), saturation=Saturation(3)
    )
    network.memory.to(dtype), network.descriptor.to(dtype)
    gathering = Gathering([8, 8, 8], 1000, torch.device("cpu"))
    for part in (slice(0, 4), slice(4, 6)):
        gathering.add(teacher, images[part], owner[part])
    gathering.finish(network)
    for number, described in enumerate(network.descriptor(teacher(images))):
        level = F.interpolate(described, size=(4, 6)).movedim(1, -1).flatten(0, 2)
        # Scaling changes no order.
        farthest = farthest_points(level, 30)
        found = torch.split(network.memory.items, 8, dim=1)[number]
        torch.testing.assert_close(found, level[farthest], atol=1e-3, rtol=1e-3)
        assert torch.equal(network.memory.owners[:, number], owner.repeat_interleave(len(level) // 6)[farthest])
    # New images of the kind lie as far as normal ones do: at 1 in all.
    distances = network.memory.distances(network.descriptor(teacher(torch.rand(50, 3, 32, 48))))
    assert 0.6 < distances.sum(dim=1).median() < 1.4
    levels = distances.movedim(1, -1).flatten(0, 2)
    assert network.saturation.usual.sum() == pytest.approx(1)
    usual, rare = (levels.quantile(share, dim=0).float() for share in (0.5, 0.995))
    torch.testing.assert_close(network.saturation.usual, usual, atol=0, rtol=0.4)
    torch.testing.assert_close(network.saturation.usual + network.saturation.spread, rare, atol=0, rtol=0.4)


def test_what_is_gathered_is_bounded() -> None:
    torch.manual_seed(0)
    gathering = Gathering([8, 8, 8], 20, torch.device("cpu"))
    for first in range(0, 400, 5):
        gathering.add(teacher, torch.rand(5, 3, 32, 32), torch.arange(first, first + 5))
    assert gathering.held_owners.tolist() == list(range(0, 8 * MOST_HELD, 8))
    assert len(gathering.held_images) == MOST_HELD
    assert len(gathering.reservoir.values) == 20
    assert int(gathering.reservoir.seen) == 400 * 16


def test_the_head_sees_the_residual_relative_to_the_image() -> None:
    head = ResidualHead(6, 8).eval()
    residual, distance = torch.randn(2, 6, 4, 4), torch.rand(2, 1, 4, 4)
    logits = head(residual, distance)
    assert logits.shape == (2, 1, 8, 8)
    for changed in (head(-residual, distance), head(residual, distance + 1), head(2 * residual, distance)):
        assert not torch.allclose(changed, logits, atol=1e-5)
    torch.testing.assert_close(head(3 * residual, 3 * distance), logits)


def test_a_vote_adds_to_a_map_within_bounds() -> None:
    vote, level = BoundedVote(), torch.tensor(0.3)
    distance, logit = torch.rand(1, 1, 20, 20), 100 * torch.randn(1, 1, 20, 20)
    torch.testing.assert_close(vote(distance, logit, level), distance)  # a head that is not trained does not count
    vote.weight.fill_(2)
    added = vote(distance, logit, level) - distance
    torch.testing.assert_close(added.aminmax(), torch.return_types.aminmax([torch.tensor(0.0), torch.tensor(0.6)]))
    assert ((added > 0.3) == (logit > 0)).all()
    expected = distance + 0.6 / (1 + math.exp(-1.5))
    torch.testing.assert_close(vote(distance, torch.full_like(logit, 3.0), level), expected)


def test_levels_saturate_beyond_the_usual() -> None:
    saturation = Saturation(2)
    saturation.usual.copy_(torch.tensor([0.4, 0.6])), saturation.spread.copy_(torch.tensor([0.2, 0.1]))
    for level, (usual, spread) in enumerate([(0.4, 0.2), (0.6, 0.1)]):
        distances = torch.tensor([0.4, 0.6]).repeat(5, 1)
        distances[:, level] = usual + spread * torch.tensor([-0.01, 0, 0.01, 1, 1e3])
        expected = spread / 0.3 * torch.tensor([-0.01, 0, 0.01, math.tanh(1), 1])
        torch.testing.assert_close(saturation(distances[..., None, None]).flatten(), expected, atol=1e-6, rtol=1e-4)
    twice = Saturation(2, 2.0)
    twice.load_state_dict(saturation.state_dict())
    all_at_once = torch.stack([torch.tensor([0.4, 0.6]) + far * torch.tensor([0.2, 0.1]) for far in (0, 0.05, 1e3)])
    for strength, module in ((1, saturation), (2, twice)):
        agreement = module(all_at_once[..., None, None])
        torch.testing.assert_close(agreement.flatten(), torch.tensor([0, math.tanh(0.05 * strength), 1]))
        # Where all levels agree a little, the excess is what each has.
        excess = module.excess(agreement).flatten()
        torch.testing.assert_close(excess[:2], torch.tensor([0.0, 0.05]), atol=1e-5, rtol=1e-2)
        assert excess[2].item() == pytest.approx(math.atanh(0.95) / 0.95 / strength, rel=1e-4)
    rising = torch.linspace(0, 0.9, 50).repeat(2, 1).mT[..., None, None]
    assert (saturation.excess(saturation(rising)).flatten().diff() > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("saturation", [0.0, 1.0])
def test_saturation_and_head_change_the_map_and_never_the_score(saturation: float) -> None:
    network = FractalMemoryModel("test_resnet", pre_trained=False, head=True, saturation=saturation).eval()
    network.saturation.usual.fill_(0.3)
    images = torch.rand(2, 3, 64, 64)
    without_vote = network(images)
    network.vote.weight.fill_(1.0)
    with_vote = network(images)
    assert not torch.allclose(with_vote.anomaly_map, without_vote.anomaly_map, rtol=0.01)
    alone = FractalMemoryModel("test_resnet", pre_trained=False, saturation=saturation).eval()
    alone.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(alone(images), without_vote)
    alone.saturation.strength = 5.0
    assert not torch.allclose(alone(images).anomaly_map, without_vote.anomaly_map, rtol=0.01)
    assert torch.equal(with_vote.pred_score, without_vote.pred_score)
    torch.testing.assert_close(alone(images).pred_score, without_vote.pred_score)


@torch.no_grad()
def test_maps_and_scores_come_to_what_a_second_way_comes_to() -> None:
    network = FractalMemoryModel(
        "test_resnet", pre_trained=False, memory_size=60, head=True, sigma=2, saturation=1.3
    ).eval()
    channels = network.teacher.channels
    items = torch.randn(60, sum(channels))
    network.memory.fill(items, torch.zeros(60, 3))
    network.vote.weight.fill_(0.7)
    usual, spread = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    network.saturation.usual.copy_(usual), network.saturation.spread.copy_(spread)
    images = torch.rand(2, 3, 64, 96)
    query = [level.movedim(1, -1) for level in network.descriptor(network.teacher(images))]
    distance, saturated, residuals = *torch.zeros(2, 2, 1, 8, 12), []
    for number, (level, level_items) in enumerate(zip(query, torch.split(items, channels, dim=1), strict=True)):
        far, nearest = torch.cdist(level, level_items).min(dim=-1)
        far = F.interpolate(far.unsqueeze(1) / level_items.shape[1] ** 0.5, size=(8, 12), mode="bilinear")
        distance += far
        saturated += spread[number] / 1.5 * (1.3 * (far - usual[number]) / spread[number]).tanh()
        residual = (level - level_items[nearest]).movedim(-1, 1)
        residuals.append(F.interpolate(residual, size=(8, 12), mode="bilinear"))
    logit = network.head(torch.cat(residuals, dim=1), distance)
    fine, shown = (F.interpolate(maps, scale_factor=2, mode="bilinear") for maps in (distance, saturated))

    def smoothed(maps: torch.Tensor) -> torch.Tensor:
        large = F.interpolate(maps, (64, 96), mode="bilinear").numpy()
        return torch.from_numpy(gaussian_filter(large, 2, axes=(-2, -1)))

    prediction = network(images)
    agreement = smoothed(shown + 0.7 / 3 / (1 + (-logit / 2).exp())) / (1 + 0.7 / 3)
    refined = (0.95 * agreement).atanh() / 0.95 / 1.3
    torch.testing.assert_close(prediction.anomaly_map, refined, atol=1e-4, rtol=1e-4)
    network.saturation.strength = 0
    plain = smoothed(fine + 0.7 * 0.5 / (1 + (-logit / 2).exp())).log1p()
    torch.testing.assert_close(network(images).anomaly_map, plain, atol=1e-4, rtol=1e-4)
    top = smoothed(fine).flatten(1).sort(descending=True).values[:, :31].mean(dim=1)  # 0.5 % of the pixels
    torch.testing.assert_close(prediction.pred_score, top.log1p(), atol=1e-4, rtol=1e-4)


def test_losses() -> None:
    mask = torch.rand(2, 1, 4, 4).round()
    perfect = SegmentationLoss()(100 * (2 * mask - 1), mask)
    assert all(part < 1e-3 for part in perfect.values())
    logits = torch.randn(2, 1, 4, 4)
    right = torch.where(mask > 0, logits.sigmoid(), 1 - logits.sigmoid())
    losses = SegmentationLoss()(logits, mask)
    torch.testing.assert_close(losses["focal"], 4 * (0.5 * -(right.log()) * (1 - right) ** 2).mean())
    overlap = 2 * (logits.sigmoid() * mask).sum() + 1
    torch.testing.assert_close(losses["dice"], 1 - overlap / (logits.sigmoid().sum() + mask.sum() + 1))


def test_stages() -> None:
    plan = StagePlan.divide(50, 10)
    assert plan == StagePlan(10, 40)
    assert [plan.stage(step) for step in (0, 9, 10, 49)] == [Stage.GATHERING] * 2 + [Stage.HEAD] * 2
    assert [StagePlan.divide(steps, 10) for steps in (10, 3, 1)] == [StagePlan(5, 5), StagePlan(1, 2), StagePlan(1, 0)]
    assert StagePlan.divide(30, float("inf")) == StagePlan(15, 15)
    assert StagePlan.divide(30, 10, head=False) == StagePlan(30, 0)
    assert plan.after(StagePlan(5, 5)) == StagePlan(5, 45)  # what is gathered stays gathered
    factors = [plan.lr_factor(step) for step in range(10, 50)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert sorted(factors[3:], reverse=True) == factors[3:]
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_the_network_is_as_large_as_told() -> None:
    network = FractalMemoryModel(
        "test_resnet", pre_trained=False, memory_size=30, head=True, width=16, sigma=2, score="max"
    )
    channels = sum(network.teacher.channels)
    assert network.memory.items.shape == (30, channels)
    assert network.head.embed.weight.shape == (16, channels + 1, 1, 1)
    assert isinstance(network.score, ImageScore)
    with torch.no_grad():
        prediction = network.eval()(torch.rand(2, 3, 64, 96))
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    plain = FractalMemoryModel("test_resnet", pre_trained=False, memory_size=30, sigma=2, score="max", saturation=0)
    plain.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        distance = plain.eval()(torch.ones(2, 3, 64, 96))
    torch.testing.assert_close(distance.pred_score, distance.anomaly_map.amax((1, 2, 3)))


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [("tf_efficientnet_lite2", [24, 48, 120]), ("convnext_tiny.dinov3_lvd1689m", [96, 192, 384])],
)
@torch.no_grad()
def test_other_teachers_of_timm_do(backbone: str, channels: list[int]) -> None:
    network = FractalMemoryModel(backbone, pre_trained=False, memory_size=30).eval()
    assert network.teacher.channels == channels
    network.memory.fill(torch.randn(30, sum(channels)), torch.zeros(30, 3))
    prediction = network(torch.rand(1, 3, 64, 96))
    assert prediction.anomaly_map.shape == (1, 1, 64, 96)
    assert prediction.anomaly_map.std() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_size": 0}, "memory_size is 0"),
        ({"memory_size": 100, "reservoir_size": 50}, "memory_size is 100, and reservoir_size 50.* give memory_size 50"),
        ({"saturation": -1}, "saturation is -1; it must be 0 or more"),
        ({"lighting": -0.5}, "lighting is -0.5; it must be 0 or more"),
        ({"part_pattern": "("}, "part_pattern is '\\('.* no regular expression"),
        ({"width": -1}, "width is -1"),
        ({"sigma": 0}, "sigma is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"backbone": "resnet9000"}, "resnet9000"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FractalMemory(**{"backbone": "test_resnet", "pre_trained": False, **arguments})


@torch.no_grad()
def test_the_distance_alone_is_that_of_the_comparison() -> None:
    network = FractalMemoryModel("test_resnet", pre_trained=False, memory_size=60)
    channels = sum(network.teacher.channels)
    network.memory.fill(torch.randn(60, channels), torch.zeros(60, 3))
    features = network.teacher(torch.rand(2, 3, 64, 96))
    _, distances = network.compare(features)
    torch.testing.assert_close(network.distances(features), distances)
