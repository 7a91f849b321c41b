# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from reference import GOLDEN, parameters, wave
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.export.networks import MatrixUpsample
from anomalib_fractalad.models.aand import AANDModel
from anomalib_fractalad.models.aand.amplification import (
    ResidualAnomalyAmplification,
    draw_positions,
    position_code,
    shrink_mask,
)
from anomalib_fractalad.models.aand.loss import (
    AmplificationLoss,
    GateLoss,
    HardDistillationLoss,
    PlainDistillationLoss,
)
from anomalib_fractalad.models.aand.stages import Stage, StagePlan
from anomalib_fractalad.models.aand.student import ResNetStudent, SmallStudent
from anomalib_fractalad.models.aand.torch_model import Alignment, distance_map
from anomalib_fractalad.models.components import AlignedUpsample, GaussianSmoothing, anomalies_within

numbers = np.load(GOLDEN / "aand.npz")
shapes = [(1, 8, 64, 64), (1, 12, 32, 32), (1, 16, 16, 16)]
teacher = [wave(shape, 0.3 * i, 0.29) + 0.2 for i, shape in enumerate(shapes)]
student = [wave(shape, 0.3 * i + 0.5, 0.33) + 0.1 for i, shape in enumerate(shapes)]


def close(ours: torch.Tensor, golden: str) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(numbers[golden]), rtol=1e-6, atol=1e-12)


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(1, 1, 256, 256, dtype=torch.float64)
    mask[..., 40:120, 60:150] = 1
    mask[..., 200:210, 200:250] = 1
    return mask


@pytest.fixture
def amplifier() -> ResidualAnomalyAmplification:
    weights = parameters("aand_parameters.json", str, scale=2.0)
    weights["gate.memory"] = weights["gate.memory"].squeeze(0)
    amplifier = ResidualAnomalyAmplification(32).double()
    amplifier.load_state_dict(weights)
    return amplifier


def test_amplification_agrees_with_the_published_code(amplifier: ResidualAnomalyAmplification) -> None:
    features = wave((2, 32, 8, 8), 0.4, 0.3).abs()
    with torch.no_grad():
        close(amplifier.gate(features).sigmoid().flatten(2).mT, "gate")
        close(amplifier(features) - features, "residual")


def test_position_code_agrees_with_the_published_code() -> None:
    torch.testing.assert_close(position_code(torch.empty(2, 32, 8, 8)), torch.as_tensor(numbers["position"]))


def test_position_code_against_a_loop() -> None:
    code = position_code(torch.empty(1, 8, 3, 5, dtype=torch.float64))
    for row in range(3):
        for column in range(5):
            for i in range(2):
                frequency = 10000 ** (-i / 2)
                for offset, position in ((0, column), (4, row)):
                    angle = torch.tensor(position * frequency, dtype=torch.float64)
                    torch.testing.assert_close(code[offset + 2 * i, row, column], angle.sin())
                    torch.testing.assert_close(code[offset + 2 * i + 1, row, column], angle.cos())


def test_position_code_of_channels_that_four_does_not_divide() -> None:
    code = position_code(torch.empty(1, 6, 3, 5, dtype=torch.float16))
    assert code.dtype == torch.float16
    torch.testing.assert_close(code, position_code(torch.empty(1, 8, 3, 5))[:6].half())


def test_gate_loss_agrees_with_the_published_code(mask: torch.Tensor) -> None:
    gates = [0.49 * wave((1, 1, *stage.shape[-2:]), 0.2 * i, 0.11) + 0.5 for i, stage in enumerate(teacher)]
    masks = [shrink_mask(mask, stage) for stage in teacher]
    close(sum(GateLoss()(gate.logit(), mask) for gate, mask in zip(gates, masks, strict=True)), "focal")


@pytest.mark.parametrize("golden", ["amplify", "amplify_foreground"])
def test_amplification_loss_agrees_with_the_published_code(mask: torch.Tensor, golden: str) -> None:
    foreground = torch.ones_like(mask)
    if golden == "amplify_foreground":
        foreground = F.pad(torch.ones(1, 1, 224, 216), (20, 20, 16, 16))
    loss = torch.zeros((), dtype=torch.float64)
    for plain, amplified in zip(teacher, student, strict=True):
        anomalous = shrink_mask(mask, plain)
        normal = shrink_mask(foreground, plain) & ~anomalous
        vectors = [
            features.movedim(1, -1)[where.squeeze(1)]
            for features, where in ((plain, normal), (plain, anomalous), (amplified, anomalous))
        ]
        loss += AmplificationLoss()(*vectors)
    close(loss, golden)


def test_amplification_loss_against_a_loop_over_pairs() -> None:
    normal, anomalous, amplified = torch.randn(7, 5), torch.randn(4, 5), torch.randn(4, 5)
    pairs = [
        torch.relu(F.cosine_similarity(n, changed, dim=0) - (F.cosine_similarity(n, a, dim=0) - 0.3))
        for n in normal
        for a, changed in zip(anomalous, amplified, strict=True)
    ]
    torch.testing.assert_close(AmplificationLoss()(normal, anomalous, amplified), torch.stack(pairs).mean())


@pytest.mark.parametrize(("normal", "anomalous"), [(0, 3), (3, 0), (0, 0)])
def test_amplification_loss_without_pairs_is_zero_and_has_a_gradient(normal: int, anomalous: int) -> None:
    amplified = torch.randn(anomalous, 5, requires_grad=True)
    loss = AmplificationLoss()(torch.randn(normal, 5), torch.randn(anomalous, 5), amplified)
    loss.backward()
    assert loss == 0
    assert not amplified.grad.any()


def test_amplification_loss_takes_the_memory_it_states() -> None:
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        AmplificationLoss()(torch.randn(5000, 16), torch.randn(1000, 16), torch.randn(1000, 16, requires_grad=True))
    assert largest == 20_000_000


def test_hard_distillation_loss_agrees_with_the_published_code() -> None:
    close(HardDistillationLoss()(teacher, student), "hard_distillation")


def test_hard_distillation_loss_of_a_batch_against_a_loop() -> None:
    ours, theirs = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = []
    for t, s in zip(ours, theirs, strict=True):
        distances = (1 - F.cosine_similarity(t, s, dim=0)).flatten().sort(descending=True).values
        expected.append(distances[:10].mean() + 1 - F.cosine_similarity(t.flatten(), s.flatten(), dim=0))
    torch.testing.assert_close(HardDistillationLoss()([ours], [theirs]), torch.stack(expected).mean())


def test_hard_distillation_loss_of_maps_with_fewer_positions() -> None:
    ours, theirs = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    hard = (1 - F.cosine_similarity(ours, theirs)).mean()
    plain = PlainDistillationLoss()([ours], [theirs])
    torch.testing.assert_close(HardDistillationLoss()([ours], [theirs]), plain + hard)


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    large = torch.full((2, 4, 8, 8), 300.0, dtype=torch.float16)  # its squared norm overflows float16
    vectors = large.flatten(1)
    zero = torch.tensor(0.0)
    for loss in (HardDistillationLoss(), PlainDistillationLoss()):
        torch.testing.assert_close(loss([large], [large]), zero, atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        amplification = AmplificationLoss()(vectors, vectors, vectors)
    torch.testing.assert_close(amplification, torch.tensor(0.3))
    gate = torch.full((1, 1, 4, 4), 20.0, dtype=torch.float16)
    focal = GateLoss()(gate, torch.zeros_like(gate) > 0)
    torch.testing.assert_close(focal, torch.tensor(0.2 * 20.0))


def test_anomaly_map_agrees_with_the_published_code() -> None:
    summed = distance_map(teacher, student, (256, 256), 3 * [AlignedUpsample()])
    close(summed[..., ::8, ::8], "map_sum")
    smooth = GaussianSmoothing(4).double()
    close(smooth(summed)[0, 0, ::8, ::8], "map_smoothed")
    exported = 3 * [MatrixUpsample(AlignedUpsample(), smooth)]
    close(distance_map(teacher, student, (256, 256), exported)[0, 0, ::8, ::8], "map_smoothed")


@pytest.mark.parametrize("tiler", [None, Tiler(64, 64)])
def test_anomaly_maps_lose_nothing_under_autocast(tiler: Tiler | None) -> None:
    model = AANDModel("test_resnet", pre_trained=False).eval()
    model.tiler = tiler
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.rand(1, 3, 128, 128))
    assert output.anomaly_map.dtype == output.pred_score.dtype == torch.float32
    assert output.anomaly_map.unique().numel() > 10_000


def test_maps_too_small_to_smooth() -> None:
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        GaussianSmoothing(4)(torch.rand(1, 1, 64, 12))
    assert GaussianSmoothing(4)(torch.rand(1, 1, 64, 16)).shape == (1, 1, 64, 16)


@pytest.mark.parametrize("backbone", ["resnet18", "test_resnet.r160_in1k", "convnext_atto"])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 133)])
def test_maps_have_the_size_of_the_image(backbone: str, size: tuple[int, int]) -> None:
    model = AANDModel(backbone, pre_trained=False).eval()
    output = model(torch.rand(2, 3, *size))
    assert output.anomaly_map.shape == (2, 1, *size)
    assert output.anomaly_map.min() >= 0
    torch.testing.assert_close(output.pred_score, output.anomaly_map.amax((1, 2, 3)))


@pytest.mark.parametrize(
    ("backbone", "student_class"),
    [("resnet18", ResNetStudent), ("mobilenetv1_100", SmallStudent), ("test_resnet", SmallStudent)],
)
def test_the_student_is_chosen_by_the_backbone(backbone: str, student_class: type) -> None:
    model = AANDModel(backbone, pre_trained=False).eval()
    assert type(model.student) is student_class
    assert model.teacher.strides == [4, 8, 16]
    features = model.advanced_teacher(torch.rand(1, 3, 64, 64))
    assert [stage.shape for stage in model.student(features)] == [stage.shape for stage in features]


def test_without_amplification_the_teacher_is_plain() -> None:
    model = AANDModel("resnet18", pre_trained=False, amplification=False).eval()
    image = torch.rand(1, 3, 64, 64)
    assert not list(model.amplifiers.parameters())
    for advanced, plain in zip(model.advanced_teacher(image), model.teacher(image), strict=True):
        assert torch.equal(advanced, plain)


def test_the_gate_decides_what_is_amplified(amplifier: ResidualAnomalyAmplification) -> None:
    features = torch.randn(1, 32, 4, 4, dtype=torch.float64)
    amplifier.gate = torch.nn.Identity()
    amplifier.gate.forward = lambda f: torch.where(torch.arange(4) < 2, -100.0, 100.0).to(f).expand(1, 1, 4, 4)
    with torch.no_grad():
        advanced = amplifier(features)
        torch.testing.assert_close(advanced[..., :2], features[..., :2])
        torch.testing.assert_close(advanced[..., 2:], (features + amplifier.residual(features))[..., 2:])


def test_a_backbone_that_lacks_a_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has no feature level 4, 8"):
        AANDModel("vit_tiny_patch16_224", pre_trained=False)


def test_positions_are_drawn_without_repetition_from_where_they_may() -> None:
    features = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    where = torch.rand(2, 1, 4, 5) > 0.5
    everything = features.movedim(1, -1)[where.squeeze(1)]
    all_drawn = draw_positions(features, where, 1000)
    assert torch.equal(all_drawn[all_drawn[:, 0].argsort()], everything)
    some = draw_positions(features, where, 5)
    assert len(some[:, 0].unique()) == 5
    assert set(some[:, 0].tolist()) <= set(everything[:, 0].tolist())
    assert draw_positions(features, torch.zeros_like(where), 5).shape == (0, 3)


class Scripted:
    """A generator that paints the given columns white, one list of columns after another."""

    def __init__(self, *columns: list[int | None]) -> None:
        self.columns = list(columns)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anomalous, mask = images.clone(), torch.zeros_like(images[:, :1])
        for i, column in enumerate(self.columns.pop(0)):
            if column is not None:
                anomalous[i, ..., column - 1 : column + 1] = 1
                mask[i, ..., column - 1 : column + 1] = 1
        return anomalous, mask


def test_anomalies_stay_within_the_foreground() -> None:
    images = torch.zeros(3, 3, 4, 8)
    foreground = torch.zeros(3, 1, 4, 8, dtype=torch.bool)
    foreground[..., 4:] = True
    # The first straddles the edge, the second misses and is drawn anew, the third is not wanted.
    generator = Scripted([4, 2, None], [2], [6])
    anomalous, mask = anomalies_within(foreground, images, generator)
    assert torch.equal(mask[:, 0, 0].float(), torch.stack([columns(4), columns(5, 6), columns()]))
    assert torch.equal(anomalous, mask.float().expand(-1, 3, -1, -1))
    assert not generator.columns


def columns(*ones: int) -> torch.Tensor:
    row = torch.zeros(8)
    row[list(ones)] = 1
    return row


def test_an_image_stays_normal_after_ten_misses() -> None:
    foreground = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    foreground[..., 4:] = True
    generator = Scripted(*[[2]] * 12)
    anomalous, mask = anomalies_within(foreground, torch.zeros(1, 3, 4, 8), generator)
    assert not mask.any()
    assert not anomalous.any()
    assert len(generator.columns) == 1


@pytest.mark.parametrize(
    ("steps", "per_epoch", "split", "amplification"),
    [
        (220, 1, (100, 120), 100),
        (2200, 10, (100, 120), 1000),
        (20, 10, (100, 120), 10),
        (30, 10, (100, 120), 10),
        (40, 10, (1, 1000), 10),
        (40, 10, (1000, 1), 30),
        (40, 10, (0, 1), 0),
        (10, 10, (100, 120), 5),
        (11, 11, (100, 120), 5),
        (1, 1, (100, 120), 0),
        (2, 1, (100, 120), 1),
        (5, 100, (100, 120), 2),
        (25, 10, (100, 120), 10),
    ],
)
def test_division_of_a_training(steps: int, per_epoch: int, split: tuple[float, float], amplification: int) -> None:
    plan = StagePlan.divide(steps, per_epoch, split)
    assert plan == StagePlan(amplification, steps - amplification)
    stages = [plan.stage(step) for step in range(steps)]
    assert stages == [Stage.AMPLIFICATION] * amplification + [Stage.DISTILLATION] * (steps - amplification)


def test_each_stage_has_a_schedule_from_its_own_start() -> None:
    plan = StagePlan(100, 120)
    first = torch.tensor([plan.lr_factor(Stage.AMPLIFICATION, step) for step in range(100)])
    second = torch.tensor([plan.lr_factor(Stage.DISTILLATION, step) for step in range(220)])
    torch.testing.assert_close(first, torch.tensor([1.0] * 80 + [0.2] * 10 + [0.04] * 10))
    torch.testing.assert_close(second, torch.tensor([1.0] * 196 + [0.2] * 12 + [0.04] * 12))


@pytest.mark.parametrize(("strides", "alignment"), [((8, 16), "corners"), ((16,), "centers"), ((8, 16, 32), "centers")])
def test_stages_of_other_strides(strides: tuple[int, ...], alignment: Alignment) -> None:
    model = AANDModel("test_resnet", pre_trained=False, strides=strides, alignment=alignment).eval()
    images = torch.rand(2, 3, 100, 140)
    features = model.advanced_teacher(images)
    decoded = model.student(features)
    sizes = [(math.ceil(100 / stride), math.ceil(140 / stride)) for stride in strides]
    assert [stage.shape[-2:] for stage in features] == [stage.shape[-2:] for stage in decoded] == sizes
    expected = model.smooth(distance_map(features, decoded, (100, 140), model.upsample))
    torch.testing.assert_close(model(images).anomaly_map, expected)


def test_other_strides_than_the_published_take_the_small_student() -> None:
    assert isinstance(AANDModel("resnet18", pre_trained=False).student, ResNetStudent)
    assert isinstance(AANDModel("resnet18", pre_trained=False, strides=(8, 16)).student, SmallStudent)


@pytest.mark.parametrize(("fine", "embedding"), [(True, (256, 7, 9)), (False, (1024, 4, 5))])
def test_size_of_the_embedding(fine: bool, embedding: tuple[int, int, int]) -> None:
    model = AANDModel("resnet18", pre_trained=False, strides=(16, 32), fine_embedding=fine).eval()
    images = torch.rand(2, 3, 200, 260)
    shapes = []
    model.student.embed.register_forward_hook(lambda *arguments: shapes.append(arguments[-1].shape[1:]))
    assert model(images).anomaly_map.shape == (2, 1, 200, 260)
    assert shapes == [embedding]


def test_a_fine_embedding_takes_the_small_student() -> None:
    model = AANDModel("resnet18", pre_trained=False, fine_embedding=True)
    assert isinstance(model.student, SmallStudent)
    features = model.teacher(torch.rand(1, 3, 64, 64))
    assert [stage.shape for stage in model.student(features)] == [stage.shape for stage in features]


@pytest.mark.parametrize("strides", [(), (4, 16), (16, 8)])
def test_strides_that_do_not_double(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"strides is .*; each must be twice the one before, such as \(4, 8, 16\)"):
        AANDModel("test_resnet", pre_trained=False, strides=strides)


@pytest.mark.parametrize("size", [(64, 96), (50, 83), (8, 33)])
def test_centers_of_receptive_fields(size: tuple[int, int]) -> None:
    """Position i lies at pixel stride x i; a second way is to sample each stage where its pixels lie."""
    strides = (8, 16)
    shapes = [(2, 5, math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in strides]
    teacher, student = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    found = distance_map(teacher, student, size, map(AlignedUpsample, strides))
    expected = torch.zeros(2, 1, *size)
    for stride, t, s in zip(strides, teacher, student, strict=True):
        y, x = (2 * torch.arange(n) / stride / max(m - 1, 1) - 1 for n, m in zip(size, t.shape[-2:], strict=True))
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).expand(2, -1, -1, -1)
        distance = 1 - F.cosine_similarity(t, s, dim=1).unsqueeze(1)
        expected += F.grid_sample(distance, grid, align_corners=True, padding_mode="border")
    torch.testing.assert_close(found, expected)


def test_a_stage_sees_most_at_the_center_that_its_position_is_put_at() -> None:
    model = AANDModel("resnet18", pre_trained=False, strides=(8, 16), alignment="centers").eval()
    images = torch.rand(8, 3, 256, 256, requires_grad=True)
    for stride, stage in zip((8, 16), model.teacher(images), strict=True):
        position = 128 // stride
        (seen,) = torch.autograd.grad(stage[:, :, position, position].square().sum(), images, retain_graph=True)
        profile = seen.abs().sum((0, 1, 2))
        center = (profile * torch.arange(256)).sum() / profile.sum()
        assert center.item() == pytest.approx(stride * position, abs=1.5)
    stretched = AANDModel("resnet18", pre_trained=False, strides=(8, 16)).eval()
    stretched.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(model.predict_map(images), stretched.predict_map(images), atol=1e-3)


def test_an_unknown_alignment() -> None:
    with pytest.raises(ValueError, match="alignment 'middle' is unknown; use one of corners, centers"):
        AANDModel("test_resnet", pre_trained=False, alignment="middle")


@pytest.mark.parametrize(("width", "layers"), [(5, [5, 5]), (None, [64, 64])])
def test_width_of_the_amplifiers(width: int | None, layers: list[int]) -> None:
    amplifier = ResidualAnomalyAmplification(32, width)
    for stack in (amplifier.gate.query, amplifier.residual.scale):
        assert [layer.out_channels for layer in stack[::2]] == [*layers, 32]
    model = AANDModel("test_resnet", pre_trained=False, amplifier_width=width).eval()
    for amplifier, channels in zip(model.amplifiers, model.teacher.channels, strict=True):
        assert amplifier.gate.query[0].out_channels == (width or 2 * channels)
    assert model(torch.rand(1, 3, 64, 64)).anomaly_map.shape == (1, 1, 64, 64)


def test_amplifiers_without_width() -> None:
    with pytest.raises(ValueError, match="amplifier_width is 0; it must be above 0"):
        AANDModel("test_resnet", pre_trained=False, amplifier_width=0)
