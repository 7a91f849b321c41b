# SPDX-License-Identifier: Apache-2.0
import math
import pickle

import pytest
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_fractalad.models.adps import ADPSModel
from anomalib_fractalad.models.adps.loss import AsymmetricDistillationLoss, FocalLoss
from anomalib_fractalad.models.adps.student import PatchStudent, from_patches, to_patches
from anomalib_fractalad.models.adps.torch_model import PostSegmentation, weight_mask_block
from anomalib_fractalad.models.components import Backbone, cosine_distance

STRIDES = (4, 8, 16)


def small_model(**arguments: object) -> ADPSModel:
    return ADPSModel(**{"backbone": "test_resnet", "pre_trained": False, "patches": 2, **arguments})


def use_statistics_of(images: Tensor, student: PatchStudent) -> PatchStudent:
    """Without them, and with residuals that timm starts at zero, the features of random weights all but vanish."""
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.ones_(module.weight)
    student.train()(images)
    return student.eval()


@pytest.mark.parametrize("patches", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(128, 128), (128, 256)])
def test_patches_as_one_batch_equal_a_loop_over_them(patches: int, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    student = use_statistics_of(images, PatchStudent("test_resnet", STRIDES, patches).double())
    height, width = (side // patches for side in size)
    with torch.no_grad():
        together = student(images)
        for row in range(patches):
            for column in range(patches):
                patch = images[..., row * height : (row + 1) * height, column * width : (column + 1) * width]
                alone = Backbone.forward(student, patch)
                for whole, part, stride in zip(together, alone, STRIDES, strict=True):
                    h, w = height // stride, width // stride
                    place = whole[..., row * h : (row + 1) * h, column * w : (column + 1) * w]
                    torch.testing.assert_close(place, part, rtol=0, atol=1e-6)
    assert [stage.shape[-2:] for stage in together] == [(size[0] // s, size[1] // s) for s in STRIDES]
    assert all(stage.std() > 0.1 for stage in together)


@pytest.mark.parametrize(("backbone", "layers"), [("resnet18", (4, 8, 16)), ("mobilenetv3_small_050", ("blocks.0", 8))])
def test_deeper_stages_see_patches_of_patches(backbone: str, layers: tuple[int | str, ...]) -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 128, 128)
    student = use_statistics_of(images, PatchStudent(backbone, layers, 2, split_layers=layers[:1]))
    plain = PatchStudent(backbone, layers, 2).eval()
    plain.load_state_dict(student.state_dict())
    with torch.no_grad():
        once, twice = plain(images), student(images)
    assert [stage.shape for stage in once] == [stage.shape for stage in twice]
    torch.testing.assert_close(once[0], twice[0])
    for ours, theirs in zip(once[1:], twice[1:], strict=True):
        assert (ours - theirs).abs().max() > 0.1
    if backbone == "resnet18":
        quarters = from_patches(plain.features.layer2(to_patches(to_patches(once[0], 2), 2)), 2)
        torch.testing.assert_close(from_patches(quarters, 2), twice[1])


def test_every_layer_but_the_last_can_be_split() -> None:
    model = small_model(split_layers=(4, 8)).eval()
    assert model.student.size_multiple == 2 * 2 * 2 * 16
    with torch.no_grad():
        assert model(torch.rand(1, 3, 128, 256)).anomaly_map.shape == (1, 1, 128, 256)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_join_reverses_split(grid: int) -> None:
    images = torch.rand(2, 3, 12, 18)
    patches = to_patches(images, grid)
    assert patches.shape == (2 * grid * grid, 3, 12 // grid, 18 // grid)
    assert torch.equal(patches[grid * grid], images[1, :, : 12 // grid, : 18 // grid])
    assert torch.equal(from_patches(patches, grid), images)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((256, 300), "256x256 or 256x384"), ((100, 500), "128x384 or 128x512"), ((90, 128), "128x128 ")],
)
def test_sizes_that_do_not_divide_are_refused(size: tuple[int, int], nearest: str) -> None:
    model = small_model(patches=8)
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]}.*patches=8.*multiples of 128.*Resize to {nearest}"):
        model(torch.rand(1, 3, *size))


def test_layers_by_name_equal_layers_by_stride() -> None:
    by_stride = small_model(backbone="resnet10t").eval()
    by_name = small_model(backbone="resnet10t", layers=("layer1", "layer2", "layer3")).eval()
    by_name.load_state_dict(by_stride.state_dict())
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(by_name(images).anomaly_map, by_stride(images).anomaly_map)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patches": 0}, "patches is 0"),
        ({"smoothing": 0.0}, "smoothing is 0.0"),
        ({"layers": (16, 4)}, r"layers \[16, 4\].*the finest first"),
        ({"layers": (4, 4)}, "one layer of each stride"),
        ({"split_layers": (16,)}, r"split_layers has \[16\]"),
        ({"split_layers": ("layer9",)}, r"split_layers has \['layer9'\]"),
        ({"layers": (4, 64)}, "no feature level 64"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


@pytest.mark.parametrize("layers", [(4, 8, 16), (2, 8), (8, 16, 32), (4,)])
def test_any_stages_give_maps_of_the_images_size(layers: tuple[int, ...]) -> None:
    model = small_model(layers=layers).eval()
    output = model(torch.rand(2, 3, 64, 128))
    assert output.anomaly_map.shape == (2, 1, 64, 128)
    assert output.pred_score.shape == (2,)
    assert output.anomaly_map.min() >= 0
    assert output.anomaly_map.max() <= 1


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv1_100", "convnext_atto", "regnetx_002"])
def test_the_decoder_is_built_from_the_channels_that_timm_reports(backbone: str) -> None:
    model = small_model(backbone=backbone).eval()
    for block, skip in zip(model.decoder.blocks, [*model.teacher.channels[1::-1], 0, 0], strict=True):
        assert block.convolve[0][0].in_channels == block.up.out_channels + skip
    assert model(torch.rand(1, 3, 64, 64)).anomaly_map.shape == (1, 1, 64, 64)


def test_the_decoder_joins_every_stage() -> None:
    decoder = PostSegmentation([6, 8, 10], STRIDES).eval()
    features = [
        torch.rand(1, c, 64 // s, 64 // s, requires_grad=True) for c, s in zip((6, 8, 10), STRIDES, strict=True)
    ]
    logits = decoder(features)
    assert logits.shape == (1, 2, 64, 64)
    gradients = torch.autograd.grad(logits.square().sum(), features)
    assert all(gradient.any() for gradient in gradients)


def test_weight_mask_block_against_a_loop() -> None:
    teacher, student = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    weighted = weight_mask_block(teacher, cosine_distance(teacher, student))
    for b in range(2):
        for y in range(3):
            for x in range(4):
                t, s = teacher[b, :, y, x], student[b, :, y, x]
                expected = (1 - t @ s / (t.norm() * s.norm())) * t
                torch.testing.assert_close(weighted[b, :, y, x], expected)


def test_the_score_is_the_maximum_of_the_smoothed_map() -> None:
    model = small_model(smoothing=2.0).eval()
    with torch.no_grad():
        model.decoder.classify.weight.mul_(20)
        output = model(torch.rand(2, 3, 64, 128))
    smoothed = gaussian_blur2d(output.anomaly_map, (17, 17), (2.0, 2.0))
    torch.testing.assert_close(output.pred_score, smoothed.amax(dim=(1, 2, 3)))


def test_distillation_loss_against_a_loop() -> None:
    mask = (torch.rand(2, 1, 8, 12) > 0.5).double()
    teacher = [torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 5, 2, 3, dtype=torch.float64)]
    student = [torch.randn_like(stage) for stage in teacher]
    expected = 0.0
    for t, s in zip(teacher, student, strict=True):
        batch, _, height, width = t.shape
        rows, columns = 8 // height, 12 // width
        terms = []
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    cell = mask[b, 0, y * rows : (y + 1) * rows, x * columns : (x + 1) * columns]
                    share = cell.sum().item() / cell.numel()
                    cosine = F.cosine_similarity(t[b, :, y, x], s[b, :, y, x], dim=0).item()
                    terms.append((1 - share) * (1 - cosine) + share * cosine)
        expected += sum(terms) / len(terms)
    loss = AsymmetricDistillationLoss()(list(map(cosine_distance, teacher, student)), mask)
    assert math.isclose(loss.item(), expected, rel_tol=1e-9)


def test_distillation_pulls_normal_and_pushes_anomalous_positions() -> None:
    same, opposite = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 2.0)
    normal, anomalous = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)
    loss = AsymmetricDistillationLoss()
    assert [loss([d], m).item() for d in (same, opposite) for m in (normal, anomalous)] == [0, 1, 2, -1]


def test_focal_loss_against_a_loop() -> None:
    logits = 3 * torch.randn(2, 2, 3, 4, dtype=torch.float64)
    mask = (torch.rand(2, 1, 3, 4) > 0.5).double()
    terms = []
    for b in range(2):
        for y in range(3):
            for x in range(4):
                normal, anomalous = (math.exp(value) for value in logits[b, :, y, x].tolist())
                p = (anomalous if mask[b, 0, y, x] else normal) / (normal + anomalous)
                terms.append(-((1 - p) ** 2) * math.log(p))
    assert math.isclose(FocalLoss()(logits, mask).item(), sum(terms) / len(terms), rel_tol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.stack([torch.full((1, 512, 512), value, dtype=dtype) for value in (12.0, -12.0)], dim=1)
    mask = torch.ones(1, 1, 512, 512)
    loss = FocalLoss()(logits, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(24.0))
    features = torch.full((1, 4, 8, 8), 300.0, dtype=dtype)  # the squared norm overflows float16
    distillation = AsymmetricDistillationLoss()([cosine_distance(features, features)], torch.zeros(1, 1, 64, 64))
    assert distillation.dtype == torch.float32
    torch.testing.assert_close(distillation, torch.tensor(0.0))


def test_a_step_under_autocast_has_finite_gradients_and_float32_losses() -> None:
    model = small_model().train()
    mask = (torch.rand(2, 1, 64, 64) > 0.7).float()
    with torch.autocast("cpu", torch.bfloat16):
        teacher, distances = model.compare(torch.rand(2, 3, 64, 64))
        logits = model.segment(teacher, distances)
        losses = AsymmetricDistillationLoss()(distances, mask), FocalLoss()(logits, mask)
    assert logits.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses)
    sum(losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def parts_with_gradient(model: ADPSModel, loss: Tensor) -> set[str]:
    model.zero_grad()
    loss.backward()
    return {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_what_each_loss_moves() -> None:
    model = small_model().train()
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    mask = (torch.rand(2, 1, 64, 64) > 0.7).float()
    teacher, distances = model.compare(torch.rand(2, 3, 64, 64))
    assert parts_with_gradient(model, AsymmetricDistillationLoss()(distances, mask)) == {"student"}
    teacher, distances = model.compare(torch.rand(2, 3, 64, 64))
    loss = FocalLoss()(model.segment(teacher, distances), mask)
    assert parts_with_gradient(model, loss) == {"student", "decoder"}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.teacher.modules())
    assert model.student.training


def test_every_trainable_parameter_gets_a_gradient() -> None:
    model = small_model().train()
    mask = (torch.rand(2, 1, 64, 64) > 0.7).float()
    teacher, distances = model.compare(torch.rand(2, 3, 64, 64))
    (AsymmetricDistillationLoss()(distances, mask) + FocalLoss()(model.segment(teacher, distances), mask)).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_teacher_keeps_no_graph() -> None:
    teacher, distances = small_model().train().compare(torch.rand(1, 3, 64, 64))
    assert not any(stage.requires_grad for stage in teacher)
    assert all(stage.requires_grad for stage in distances)


def test_a_model_with_split_layers_can_be_pickled() -> None:
    model = small_model(split_layers=(4,)).eval()
    copy: nn.Module = pickle.loads(pickle.dumps(model))  # noqa: S301
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(copy(images).anomaly_map, model(images).anomaly_map)
