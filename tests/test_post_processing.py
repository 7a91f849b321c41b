# SPDX-License-Identifier: Apache-2.0
"""Normalization and thresholds by themselves, without a training."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from conftest import FLOAT32
from openvino import Core, convert_model

from anomalib_fractalad.export.openvino import decide_constant_choices
from anomalib_fractalad.post_processing import OrderPreservingPostProcessor
from anomalib_fractalad.post_processing.normal_pixels import NormalPixelThreshold
from anomalib_fractalad.post_processing.normalization import HIGHEST, LOWEST, normalize

TRAINER = SimpleNamespace(is_global_zero=True)
NAN = float("nan")


def scalars(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(value) for value in values]


RANGES = {  # lowest, highest, threshold
    "in the middle": (0.0, 1.0, 0.5),
    "low": (1e-9, 1.0, 0.02),
    "hardly above the lowest": (0.1, 1.0, 0.1001),
    "hardly below the highest": (0.0, 1.0, 0.99),
    "the lowest": (0.0, 1.0, 0.0),
    "the highest": (0.0, 1.0, 1.0),
    "below all": (0.2, 0.4, 0.05),
    "above all": (0.2, 0.4, 0.9),
    "negative": (-3.0, -1.0, -2.0),
    "in a narrow range": (0.5, 0.5001, 0.50003),
    "the only value": (0.7, 0.7, 0.7),
    "zero, the only value": (0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_normalized_values_rise_strictly(name: str) -> None:
    low, high, threshold = RANGES[name]
    span = high - low or threshold or 1.0
    values = torch.cat([low + span * torch.linspace(-3, 4, 9001), torch.tensor([low, high, threshold])]).unique()
    values = values[values.diff(append=values[-1:] + span) > 1e-5 * span]
    if threshold not in values:
        values[(values - threshold).abs().argmin()] = threshold
    normalized = normalize(values, *scalars(low, high, threshold))
    assert (normalized.diff() > 0).all()
    assert (normalized > 0).all()
    assert (normalized < 1).all()
    assert normalized[values == threshold].item() == 0.5
    # Continuous: where values are next to each other, so is what becomes of them.
    for edge in (low, high, threshold):
        around = torch.tensor(edge).nextafter(torch.tensor([-9.0, 9.0]))
        assert normalize(around, *scalars(low, high, threshold)).diff() < 0.01


def test_segments_are_linear() -> None:
    normalized = normalize(torch.tensor([2.0, 3.0, 4.0, 6.0, 8.0]), *scalars(2.0, 8.0, 4.0))
    expected = torch.tensor([LOWEST, 0.25, 0.5, (0.5 + HIGHEST) / 2, HIGHEST])
    torch.testing.assert_close(normalized, expected, atol=1e-7, rtol=0)


def test_faint_probabilities_stay_apart() -> None:
    values = torch.logspace(-12, 0, 10_000)
    for low in (0.0, 1e-9):
        assert (normalize(values, *scalars(low, 1.0, 0.3)).diff() > 0).all()


def test_values_that_are_no_numbers() -> None:
    normalized = normalize(torch.tensor([torch.inf, -torch.inf, NAN]), *scalars(0.0, 1.0, 0.3))
    assert normalized[:2].tolist() == [1, 0]
    assert normalized[2].isnan()


def validated(**arguments: Any) -> OrderPreservingPostProcessor:
    """A post-processor that knows scores from 0.4 to 0.6 and maps from 0 to 1, with a low threshold."""
    post_processor = OrderPreservingPostProcessor(**arguments)
    values = {"image_min": 0.4, "image_max": 0.6, "_image_threshold": 0.45}
    values |= {"pixel_min": 1e-6, "pixel_max": 1.0, "_pixel_threshold": 0.02}
    post_processor.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return post_processor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_is_at_least_float32(dtype: torch.dtype) -> None:
    values = torch.linspace(0, 1.2, 200).to(dtype).unique()
    maps = validated()(InferenceBatch(pred_score=values[:1], anomaly_map=values)).anomaly_map
    assert maps.dtype == torch.promote_types(dtype, torch.float32)
    assert (maps.diff() > 0).all()


def test_sensitivity_moves_the_threshold_of_normalized_values() -> None:
    predictions = InferenceBatch(pred_score=torch.linspace(0.3, 0.7, 50), anomaly_map=torch.rand(50, 1, 8, 8))
    plain = validated()(predictions)
    assert torch.equal(plain.pred_label, predictions.pred_score > 0.45)
    assert torch.equal(plain.pred_mask, predictions.anomaly_map > 0.02)
    bold = validated(image_sensitivity=0.7, pixel_sensitivity=0.2)
    assert bold.normalized_image_threshold.item() == pytest.approx(0.3)
    assert bold.normalized_pixel_threshold.item() == pytest.approx(0.8)
    moved = bold(predictions)
    assert torch.equal(moved.anomaly_map, plain.anomaly_map)
    assert torch.equal(moved.pred_label, plain.pred_score > 0.3)
    assert torch.equal(moved.pred_mask, plain.anomaly_map > 0.8)


def test_without_normalization_raw_values_meet_raw_thresholds() -> None:
    predictions = InferenceBatch(pred_score=None, anomaly_map=torch.rand(5, 1, 8, 8) / 2)
    processed = validated(enable_normalization=False)(predictions)
    assert torch.equal(processed.anomaly_map, predictions.anomaly_map)
    assert torch.equal(processed.pred_mask, predictions.anomaly_map > 0.02)
    assert torch.equal(processed.pred_label, predictions.anomaly_map.amax((-2, -1)) > 0.45)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_sensitivity": 1.5}, "image_sensitivity is 1.5; it must be from 0 to 1"),
        ({"pixel_sensitivity": NAN}, "pixel_sensitivity is nan; it must be from 0 to 1"),
        ({"pixel_false_positive_rate": 0.0}, "pixel_false_positive_rate is 0.0; it must be above 0 and below 1"),
        ({"pixel_false_positive_rate": NAN}, "pixel_false_positive_rate is nan; it must be above 0 and below 1"),
        ({"image_sensitivity": 0.4, "enable_normalization": False}, "image_sensitivity is 0.4, which needs normalized"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OrderPreservingPostProcessor(**arguments)


def test_state_and_settings_are_those_of_anomalib() -> None:
    """Checkpoints that hold anomalib's post-processor load, and conversely."""
    ours, theirs = validated(pixel_sensitivity=0.2, pixel_false_positive_rate=0.01), PostProcessor()
    theirs.load_state_dict(ours.state_dict())
    loaded = OrderPreservingPostProcessor(pixel_false_positive_rate=0.25)
    loaded.load_state_dict(theirs.state_dict())
    loaded.load_checkpoint_config(theirs.checkpoint_config())
    assert loaded.pixel_false_positive_rate == 0.25
    loaded.load_checkpoint_config(ours.checkpoint_config())
    assert (loaded.pixel_sensitivity, loaded.pixel_false_positive_rate) == (0.2, 0.01)
    assert loaded.pixel_threshold == ours.pixel_threshold


def batch(label: bool | None, mask: bool | None, scale: float = 1.0) -> ImageBatch:
    """An image with a map of 10,000 even steps; its mask is missing, blank, or marks what is above 0.9."""
    values = torch.linspace(0, 1, 10_000).reshape(1, 100, 100)
    masks = None if mask is None else (values > 0.9) & mask
    labels = None if label is None else torch.tensor([label])
    image = torch.zeros(1, 3, 100, 100)
    return ImageBatch(
        image=image, gt_label=labels, gt_mask=masks, anomaly_map=scale * values, pred_score=scale * values.mean()[None]
    )


def validate(post_processor: PostProcessor, *batches: ImageBatch) -> float:
    post_processor.on_validation_start(TRAINER, None)
    for outputs in batches:
        post_processor.on_validation_batch_end(TRAINER, None, outputs)
    post_processor.on_validation_epoch_end(TRAINER, None)
    return post_processor.pixel_threshold.item()


def test_pixel_threshold_without_masks(caplog: pytest.LogCaptureFixture) -> None:
    post_processor = OrderPreservingPostProcessor()
    assert validate(post_processor, batch(False, True), batch(True, True)) == pytest.approx(0.9, abs=1e-3)
    assert post_processor._normal_pixels is None  # of 2 MiB; exported models would carry it
    # Normal pixels, without masks at all, and with blank ones; what an earlier validation has found is forgotten.
    for normal, anomalous in [(None, None), (False, None), (False, False)]:
        batches = [batch(False, normal, 0.5), batch(False, normal, 0.3), batch(True, anomalous)]
        assert validate(post_processor, *batches) == pytest.approx(0.499, rel=4e-3)
    validate(post_processor, batch(None, None), batch(False, None, 0.5))
    assert post_processor.pixel_threshold.item() == pytest.approx(0.4995, rel=4e-3)
    # One mask with a defect is enough for anomalib's threshold.
    assert validate(post_processor, batch(False, None), batch(True, None), batch(True, True)) == pytest.approx(
        0.9, 1e-3
    )
    # No normal image.
    with caplog.at_level(logging.WARNING):
        assert validate(post_processor, batch(True, None)) == post_processor.image_threshold.item()
    assert "no pixel threshold, and the image threshold stands in for it" in caplog.text
    post_processor.enable_threshold_matching = False
    assert np.isnan(post_processor.pixel_threshold.item())


def test_what_a_broken_validation_has_seen_is_forgotten() -> None:
    post_processor = OrderPreservingPostProcessor()
    post_processor.on_validation_batch_end(TRAINER, None, batch(False, None, 100.0))
    assert validate(post_processor, batch(False, None)) == pytest.approx(0.999, rel=4e-3)
    assert post_processor.pixel_max == 1


@pytest.mark.parametrize("rate", [0.3, 0.01, 0.0005])
def test_share_of_normal_pixels_above_the_threshold(rate: float) -> None:
    for transform in (torch.nn.Identity(), torch.exp, lambda maps: 1e-20 * maps):
        maps, labels = transform(4 * torch.randn(20, 1, 64, 64)), torch.tensor([0, 1] * 10)
        metric, halves = NormalPixelThreshold(rate), NormalPixelThreshold(rate)
        metric.update(maps, labels)
        for part in (slice(10, 20), slice(10)):
            halves.update(maps[part], labels[part])
        threshold, _ = metric.compute()
        assert torch.equal(halves.compute()[0], threshold)
        share = (maps[labels == 0] > threshold).float().mean()
        assert 0.9 * rate < share <= rate


class Processing(torch.nn.Module):
    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, image: torch.Tensor) -> InferenceBatch:
        return self.post_processor(InferenceBatch(pred_score=image.mean((1, 2, 3)), anomaly_map=image))


def test_exported_networks_normalize_as_torch_does(tmp_path: Path) -> None:
    network = Processing(validated(image_sensitivity=0.45))
    images = torch.rand(64, 1, 16, 16) ** 4 * torch.linspace(0.5, 5, 64)[:, None, None, None]
    expected = network(images)
    names = list(expected._fields)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        network,
        (images,),
        file,
        opset_version=18,
        verbose=False,
        input_names=["input"],
        output_names=list(expected._fields),
    )
    onnx = dict(
        zip(expected._fields, onnxruntime.InferenceSession(file).run(None, {"input": images.numpy()}), strict=False)
    )
    model = convert_model(file, extension=[decide_constant_choices()])
    kinds = [operation.get_type_name() for operation in model.get_ordered_ops()]
    assert "Select" not in kinds
    openvino = Core().compile_model(model, "CPU", FLOAT32)(images.numpy())
    for name in names:
        reference = getattr(expected, name)
        for found in (onnx[name], openvino[name]):
            torch.testing.assert_close(torch.from_numpy(found), reference, atol=1e-6, rtol=0)
    found = torch.from_numpy(openvino["anomaly_map"]).flatten()
    order = images.flatten().argsort()
    assert (found[order].diff() >= 0).all()
    assert found.unique().numel() > 0.99 * images.unique().numel()
