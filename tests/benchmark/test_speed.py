# SPDX-License-Identifier: Apache-2.0
"""The speed benchmarks measure what they say; how fast it is, is not tested."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.deploy import TorchInferencer

from anomalib_fractalad.benchmark import image_size as image_size_benchmark
from anomalib_fractalad.benchmark.generator_speed import generator_speed
from anomalib_fractalad.benchmark.image_size import image_size
from anomalib_fractalad.benchmark.inference_speed import inference_speed
from anomalib_fractalad.benchmark.loading_speed import loading_speed
from anomalib_fractalad.benchmark.measure import seconds_each
from anomalib_fractalad.benchmark.training_speed import _keep_gradients, _make, training_speed


def test_generator_speed(capsys: pytest.CaptureFixture[str]) -> None:
    generator_speed(batch_size=2, image_size=64, repetitions=1)
    printed = capsys.readouterr().out
    assert "2 images of 64 x 64 on cpu, 1 CPU thread(s)" in printed
    assert len(printed.splitlines()) == 6


def test_training_speed(capsys: pytest.CaptureFixture[str]) -> None:
    results = training_speed("test_resnet", batch_size=2, image_size=128, steps=1, memory=False)
    ours = results["FractalAD"]
    unavoidable = (
        2 * ours["teacher_s"]
        + ours["student with gradient_s"]
        + ours["student without gradient_s"]
        + ours["head, forward and backward_s"]
    )
    assert ours["step / unavoidable parts"] == pytest.approx(ours["step_s"] / unavoidable)
    assert results["AAND"].keys() == {
        "step of stage 1_s",
        "step of stage 2_s",
        "anomalies in a step of stage 1_s",
        "anomalies' share of a step of stage 1",
    }
    for name in ("FractalAD", "ADPS"):
        assert 0 < results[name]["anomalies in a step_s"] < results[name]["step_s"]
    assert "test_resnet, batches of 2 images of 128 x 128" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [False, True])
def test_the_memory_comparison_keeps_gradients_everywhere(keep: bool) -> None:
    model, images = _make("FractalAD", "test_resnet", 2, 64, "cpu")
    if keep:
        _keep_gradients(model)
    model.model.segment(images).sum().backward()
    for part in (model.model.teacher, model.model.student):
        assert all((parameter.grad is not None) == keep for parameter in part.parameters())


def test_inference_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    memories = []

    def predict(inferencer: Any, images: Any) -> list[float]:
        if isinstance(inferencer, TorchInferencer):
            memories.append(getattr(inferencer.model.model, "memory_bank", torch.empty(0, 0)).shape)
        return seconds_each(inferencer, images)

    monkeypatch.setattr("anomalib_fractalad.benchmark.inference_speed.seconds_each", predict)
    seconds = inference_speed(
        "test_resnet",
        image_size=64,
        repetitions=1,
        models=("FractalAD",),
        runtimes=("torch", "openvino_fp32", "openvino_int8"),
        others=("Patchcore",),
        arguments={
            "FractalAD": {"distillation": False},
            "Patchcore": {"backbone": "test_resnet", "layers": ["layer2", "layer3"]},
        },
        memory_items=100,
        sizes={"Patchcore": 96},
    )
    assert memories == [(0, 0), (100, 240)]
    times = {name: seconds.pop(f"FractalAD {name}") for name in ("torch", "openvino_fp32", "openvino_int8")}
    printed = capsys.readouterr().out
    for ratio in (times["openvino_fp32"] / times["torch"], times["openvino_int8"] / times["torch"]):
        assert f"{ratio:.2f} x torch" in printed
    assert f"{times['openvino_int8'] / times['openvino_fp32']:.2f} x FP32" in printed
    (other,) = seconds.values()
    assert list(seconds) == ["Patchcore torch"]
    assert "one image of 64 x 64, 1 CPU thread(s)\nPatchcore resizes it to 96 x 96\n" in printed
    assert f"Patchcore takes {other / times['openvino_fp32']:.1f} x as long" in printed


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"arguments": {"Aand": {}}}, "arguments are for Aand; timed are AAND, ADPS, FractalAD, Draem, Patchcore"),
        ({"sizes": {"Aand": 64}}, "sizes are for Aand; timed are AAND, ADPS, FractalAD, Draem, Patchcore"),
        ({"sizes": {"AAND": 0}}, "AAND is 0; it must be above 0"),
        ({"memory_items": 0}, "memory_items is 0; it must be above 0"),
        ({"runtimes": ("openvino_fp32",)}, "runtimes is openvino_fp32; it must be of torch, .* torch among them"),
        ({"runtimes": ("torch", "onnx")}, "runtimes is torch, onnx; it must be of torch"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference_speed(**mistake)


def test_image_size(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_size_benchmark, "_in_a_process", lambda function, arguments: function(*arguments))
    image_size(sizes=(64,), models=("AAND",), tasks=("train 1", "torch"), backbone="test_resnet")
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "| model | task | 64 |"
    assert [row.split(" | ")[1] for row in rows] == ["train 1", "torch"]
    for row in rows:
        assert 0.2 < float(row.split("|")[3]) < 20  # GB


def test_loading_speed(tile_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = loading_speed(
        tile_root / "train/good", "test_resnet", batch_size=2, image_size=64, workers=(0,), epochs=1, steps=1
    )
    assert rates.keys() == {"0 workers", "cache, 0 workers", "training"}
    ratio = rates["0 workers"] / rates["training"]
    printed = capsys.readouterr().out
    assert "8 images, the first of 64 x 64, in batches of 2" in printed
    assert f"{ratio:.1f} x training" in printed
