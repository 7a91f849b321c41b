# SPDX-License-Identifier: Apache-2.0
"""The speed benchmarks measure what they say; how fast it is, is not tested."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import image_size as image_size_benchmark
import numpy as np
import openvino
import pytest
import torch
from anomalib.deploy import TorchInferencer
from anomalib.models.components import KCenterGreedy
from conftest import one_program
from generator_speed import generator_speed
from image_size import image_size
from inference_speed import inference_speed
from loading_speed import loading_speed
from memory_speed import memory_speed
from openvino import opset13 as opset
from quick_patchcore import QuickPatchcore
from training_speed import _keep_gradients, _make, training_speed

from anomalib_fractalad.benchmark.config import RUNTIMES
from anomalib_fractalad.benchmark.exports import images_per_second, load, seconds_each


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
        "step of stage 2, features kept_s",
        "step of stage 2 / with features kept",
    }
    assert results["FractalMemory"].keys() == {
        "step of stage 1_s",
        "step of stage 2_s",
        "anomalies in a step of stage 2_s",
        "anomalies' share of a step of stage 2",
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


@pytest.mark.slow
def test_inference_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model in every runtime, PatchCore too, with the scores of torch in OpenVINO FP32."""
    memories, maps, rates = [], [], []

    def predict(inferencer: Any, images: Any, clock: Callable[[], float]) -> list[float]:
        assert clock is time.process_time
        if isinstance(inferencer, TorchInferencer):
            memories.append(getattr(inferencer.model.model, "memory_bank", torch.empty(0, 0)).shape)
        maps.append(torch.as_tensor(inferencer.predict(images[0]).anomaly_map).detach().squeeze().numpy())
        rates.append(images_per_second(inferencer, images, 1))
        return seconds_each(inferencer, images, clock)

    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setattr("inference_speed.seconds_each", predict)
    with one_program():
        seconds = inference_speed(
            "test_resnet",
            image_size=64,
            repetitions=1,
            models=("ADPS", "Patchcore"),
            arguments={
                "ADPS": {"patches": 2},
                "Patchcore": {"backbone": "test_resnet", "layers": ["layer2", "layer3"], "memory_items": 100},
            },
            memory_items=7,
            sizes={"Patchcore": 96},
            cpu_time=True,
        )
    assert "TRUST_REMOTE_CODE" not in os.environ
    assert memories == [(0, 0), (100, 240)]
    assert list(seconds) == [f"{name} {runtime}" for name in ("ADPS", "Patchcore") for runtime in RUNTIMES]
    assert min(rates) > 0
    assert not np.array_equal(maps[3], maps[1])  # INT8 and FP32; PatchCore's maps tie at 1 here
    for torch_map, float32, *_ in (maps[:4], maps[4:]):
        assert float32 == pytest.approx(torch_map, abs=1e-4)
    printed = capsys.readouterr().out
    for name in ("ADPS", "Patchcore"):
        assert f"{seconds[f'{name} openvino_fp32'] / seconds[f'{name} torch']:.2f} x torch" in printed
        assert f"{seconds[f'{name} openvino_int8'] / seconds[f'{name} openvino_fp32']:.2f} x openvino_fp32" in printed
    assert "one image of 64 x 64, 1 CPU thread(s), CPU time\nPatchcore has one of 96 x 96\n" in printed
    for runtime in RUNTIMES:
        ratio = seconds[f"Patchcore {runtime}"] / seconds[f"ADPS {runtime}"]
        assert f"{ratio:.2f} x ADPS {runtime}\n" in printed


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            {"arguments": {"Aand": {}}},
            "arguments are for Aand; timed are AAND, ADPS, FractalAD, FractalMemory, Draem, Patchcore",
        ),
        (
            {"sizes": {"Aand": 64}},
            "sizes are for Aand; timed are AAND, ADPS, FractalAD, FractalMemory, Draem, Patchcore",
        ),
        ({"sizes": {"AAND": 0}}, "AAND is 0; it must be above 0"),
        ({"memory_items": 0}, "memory_items is 0; it must be above 0"),
        ({"runtimes": ()}, "runtimes is empty; it must be of torch, "),
        ({"runtimes": ("torch", "onnx")}, "runtimes is torch, onnx; it must be of torch"),
    ],
)
def test_mistakes_are_told_before_anything_is_timed(mistake: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inference_speed(**mistake)


def test_outputs_with_several_names_are_known_by_their_own(tmp_path: Path) -> None:
    """OpenVINO leaves out layers that change nothing; an output then has their names, too."""
    image = opset.parameter([1, 3, 8, 8], np.float32)
    outputs = {"pred_score": opset.reduce_max(image, np.array([1, 2, 3])), "anomaly_map": opset.negative(image)}
    for name, layer in outputs.items():
        layer.output(0).get_tensor().set_names({name, *(f"{name}_{number}" for number in range(20))})
    file = tmp_path / "model.xml"
    openvino.save_model(openvino.Model(list(outputs.values()), [image]), file, compress_to_fp16=False)
    for runtime in ("openvino_fp32", "openvino_int8"):  # bfloat16, the default of some processors, ruins distances
        assert load(file, runtime).model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    values = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    found = load(file, "openvino_fp32").predict(values)
    assert found.pred_score == pytest.approx(values.max())
    np.testing.assert_allclose(found.anomaly_map.squeeze(), -values.transpose(2, 0, 1))


def test_entries_of_one_model_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"layers": ["layer2", "layer3"], "backbone": "test_resnet", "pre_trained": False}
    models = ("FractalMemory", "FractalMemory with a head", "Padim")
    arguments = {"FractalMemory with a head": {"head": True}, "Padim": {**layers, "n_features": 20}}
    seconds = inference_speed(
        "test_resnet", 64, repetitions=1, models=models, runtimes=("torch",), arguments=arguments, memory_items=50
    )
    assert list(seconds) == [f"{name} torch" for name in models]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " torch " in line]
    work = [float(line[line.index("GFLOP") - 1]) for line in lines]
    assert work[0] < work[1]


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


def test_memory_speed(capsys: pytest.CaptureFixture[str]) -> None:
    results = memory_speed(candidates=3000, channels=5, items=200)
    assert results["same"] == 1
    printed = capsys.readouterr().out
    assert "200 of 3000 candidates with 5 channels, 1 CPU thread(s)" in printed
    assert f"{results['one by one_s'] / results['choice_s']:.1f} x as fast" in printed


def test_quick_patchcore_chooses_as_anomalib() -> None:
    features = torch.randn(60, 5)
    torch.manual_seed(0)
    # three dimensions are not projected
    expected = KCenterGreedy(embedding=features[..., None], sampling_ratio=0.5).select_coreset_idxs()
    torch.manual_seed(0)
    model = QuickPatchcore(items=30, backbone="resnet18", layers=["layer1"], pre_trained=False)
    model.model.embedding_store.append(features)
    torch.manual_seed(0)
    model.fit()
    assert torch.equal(model.model.memory_bank, features[expected])


@pytest.mark.parametrize("items", [7, 0.06])
def test_quick_patchcore_keeps_so_many_items(items: float) -> None:
    model = QuickPatchcore(items=items, backbone="resnet18", layers=["layer1"], pre_trained=False)
    model.train()
    model.training_step(SimpleNamespace(image=torch.rand(2, 3, 32, 32)))
    features = torch.vstack(model.model.embedding_store)
    assert len(features) == 128
    model.fit()
    assert model.model.memory_bank.shape == (7, 64)
    assert (model.model.memory_bank[:, None] == features).all(dim=2).any(dim=1).all()
