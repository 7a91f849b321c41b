# SPDX-License-Identifier: Apache-2.0
import json
import re

import numpy as np
import pytest
import torch
from reference import GOLDEN, parameters, wave
from torch import nn

from anomalib_fractalad.models.components import Backbone, FrozenTeacher, ImageScore
from anomalib_fractalad.models.fractalad.loss import DiceLoss, DistillationLoss, SegmentationLoss
from anomalib_fractalad.models.fractalad.torch_model import (
    FractalADModel,
    SegmentationHead,
    cosine_similarity_attention,
    warp,
)

numbers = np.load(GOLDEN / "fractalad.npz")
channels = json.loads((GOLDEN / "fractalad_parameters.json").read_text())["channels"]
shapes = [(2, c, 32 >> j, 32 >> j) for j, c in enumerate(channels)]


def close(ours: torch.Tensor, golden: str) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(numbers[golden]), rtol=1e-6, atol=1e-12)


def head_name(name: str) -> str:
    name = re.sub(r"^(lateral|smooth)\.(\d)\.conv", r"\1.\2.0", name)
    name = re.sub(r"^(lateral|smooth)\.(\d)\.norm", r"\1.\2.1", name)
    name = re.sub(r"^flow\.(\d)\.conv", r"align.\1.flow", name)
    return name.replace("head.conv1", "fuse.0").replace("head.norm", "fuse.1").replace("head.conv2", "classify")


@pytest.fixture
def golden_head() -> SegmentationHead:
    head = SegmentationHead(channels).double().eval()
    keys = head.load_state_dict(parameters("fractalad_parameters.json", head_name), strict=False)
    assert not keys.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in keys.missing_keys)
    return head


def golden_features() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    teacher = [wave(shape, 0.25 * j, 0.31) for j, shape in enumerate(shapes)]
    student = [wave(shape, 0.25 * j + 1.0, 0.37) for j, shape in enumerate(shapes)]
    return teacher, student


def test_head_agrees_with_the_published_code(golden_head: SegmentationHead) -> None:
    features = [wave(shape, 0.5 * j, 0.3) for j, shape in enumerate(shapes)]
    with torch.no_grad():
        close(golden_head(features, (128, 128)), "logits")


def test_head_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in SegmentationHead([64, 128, 256, 512]).parameters()) == 328_519


def test_attention_agrees_with_the_published_code() -> None:
    teacher, student = golden_features()
    for j in (0, 3):
        close(cosine_similarity_attention(teacher[j], student[j])[:, :4], f"att{j}")


def test_losses_agree_with_the_published_code() -> None:
    close(DistillationLoss()(*golden_features()), "kd")
    logits, mask = torch.as_tensor(numbers["logits"]), torch.as_tensor(numbers["mask"]).double()
    loss = SegmentationLoss()
    close(sum(loss(logits, mask).values()), "dice_bce")
    close(sum(loss(logits, torch.zeros_like(mask)).values()), "dice_bce_empty")


def test_losses_of_half_precision_are_computed_in_float32() -> None:
    logits = torch.full((1, 1, 512, 512), 12.0, dtype=torch.float16)  # their sum overflows float16
    mask = torch.ones_like(logits)
    parts = SegmentationLoss()(logits, mask)
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert DiceLoss()(logits, mask) < 1e-3
    features = [torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)]  # so does their squared norm
    torch.testing.assert_close(DistillationLoss()(features, features), torch.tensor(0.0))


def test_a_warp_by_whole_pixels_shifts_the_image() -> None:
    image = torch.rand(1, 2, 5, 5, dtype=torch.float64)
    flow = torch.zeros(1, 2, 5, 5, dtype=torch.float64)
    # The published pairing of size - 1 with align_corners=False stretches positions p to p * 5 / 4 - 1 / 2.
    x, y = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="xy")
    flow[0, 0] = (x + 1 + 0.5) * 4 / 5 - x
    flow[0, 1] = (y + 0.5) * 4 / 5 - y
    expected = torch.zeros_like(image)
    expected[..., :, :4] = image[..., :, 1:]
    torch.testing.assert_close(warp(image, flow), expected)


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (70, 53)])
@pytest.mark.parametrize("distillation", [True, False])
def test_maps_have_the_size_of_the_image(size: tuple[int, int], distillation: bool) -> None:
    model = FractalADModel("resnet18", pre_trained=False, distillation=distillation).eval()
    output = model(torch.rand(2, 3, *size))
    assert output.anomaly_map.shape == (2, 1, *size)
    assert output.pred_score.shape == (2,)
    assert output.anomaly_map.min() >= 0
    assert output.anomaly_map.max() <= 1


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("mobilenetv1_100", [128, 256, 512, 1024]),
        ("convnext_atto", [40, 80, 160, 320]),
    ],
)
def test_the_head_is_built_from_the_channels_that_timm_reports(backbone: str, expected: list[int]) -> None:
    model = FractalADModel(backbone, pre_trained=False).eval()
    assert model.teacher.channels == expected
    assert model.teacher.strides == [4, 8, 16, 32]
    assert model(torch.rand(1, 3, 64, 64)).anomaly_map.shape == (1, 1, 64, 64)


def test_a_backbone_that_lacks_a_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'vit_tiny_patch16_224' has no feature level 4, 8, 32.*resnet18"):
        FractalADModel("vit_tiny_patch16_224", pre_trained=False)


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'resnet19' is not a timm model; similar names: .*resnet"):
        FractalADModel("resnet19", pre_trained=False)


def test_levels_by_name_equal_levels_by_stride() -> None:
    torch.manual_seed(0)
    by_stride = Backbone("resnet18", (4, 16), pre_trained=False).eval()
    by_name = Backbone("resnet18", ("layer1", "layer3"), pre_trained=False).eval()
    by_name.load_state_dict(by_stride.state_dict())
    image = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(by_stride(image), by_name(image), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_images_are_normalized_inside() -> None:
    backbone = Backbone("resnet18", (4,), pre_trained=False).eval()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(backbone(image)[0], backbone.features((image - mean) / std)[0])


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Parts of the model whose parameters or statistics differ from before."""
    return {
        name.partition(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }


def step(model: FractalADModel, loss: torch.Tensor) -> None:
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)


@pytest.fixture
def training_model() -> FractalADModel:
    torch.manual_seed(0)
    return FractalADModel("resnet18", pre_trained=False).train()


def parameters_with_gradient(model: FractalADModel) -> set[str]:
    return {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_segmentation_loss_moves_the_head_alone(training_model: FractalADModel) -> None:
    loss = SegmentationLoss()(training_model.segment(torch.rand(2, 3, 64, 64)), torch.ones(2, 1, 64, 64))
    step(training_model, sum(loss.values()))
    assert parameters_with_gradient(training_model) == {"head"}


def test_the_distillation_loss_moves_the_student_alone(training_model: FractalADModel) -> None:
    images = torch.rand(2, 3, 64, 64)
    step(training_model, DistillationLoss()(training_model.teacher(images), training_model.student(images)))
    assert parameters_with_gradient(training_model) == {"student"}


def test_the_teacher_never_changes(training_model: FractalADModel) -> None:
    before = {name: value.clone() for name, value in training_model.state_dict().items()}
    images = torch.rand(2, 3, 64, 64)
    loss = DistillationLoss()(training_model.teacher(images), training_model.student(images))
    loss = loss + sum(SegmentationLoss()(training_model.segment(images), torch.ones(2, 1, 64, 64)).values())
    step(training_model, loss)
    assert moved(training_model, before) == {"student", "head"}
    assert not any(module.training for module in training_model.teacher.modules())


def test_no_graph_is_kept_where_no_gradient_flows(training_model: FractalADModel) -> None:
    saved: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    images = torch.rand(2, 3, 64, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert not any(features.requires_grad for features in training_model.teacher(images))
        assert not saved
        training_model.segment(images)
    assert (64, 3, 7, 7) not in saved, "the student's stem is in the graph of the segmentation loss"
    assert (2, 3, 64, 64) not in saved


def test_the_student_sees_the_batch_statistics_of_anomalous_images(training_model: FractalADModel) -> None:
    before = {name: value.clone() for name, value in training_model.state_dict().items()}
    training_model.segment(torch.rand(2, 3, 64, 64))
    assert moved(training_model, before) == {"student", "head"}


def test_teacher_is_frozen() -> None:
    teacher = FrozenTeacher("resnet18", (4,), pre_trained=False).train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_image_scores() -> None:
    pixels = torch.arange(2 * 10 * 20.0).view(2, 1, 10, 20)
    torch.testing.assert_close(ImageScore("mean")(pixels), pixels.view(2, -1).mean(1))
    torch.testing.assert_close(ImageScore("max")(pixels), torch.tensor([199.0, 399.0]))
    torch.testing.assert_close(ImageScore("top", top_share=0.02)(pixels), torch.tensor([197.5, 397.5]))
    torch.testing.assert_close(ImageScore("top", top_share=0.0001)(pixels), torch.tensor([199.0, 399.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "median"}, "'median'.*mean, max, top"),
        ({"top_share": 0.0}, "0.0.*above 0"),
        ({"top_share": 1.5}, "1.5"),
    ],
)
def test_a_wrong_score_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FractalADModel("resnet18", pre_trained=False, **arguments)
