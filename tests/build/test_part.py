# SPDX-License-Identifier: Apache-2.0
"""Part folders: export, its check against torch, and inspection without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import in_onnx_runtime, make_odd_images, make_tiles, save, small_engine, small_model
from openvino import Core
from PIL import Image

from anomalib_fractalad import FalseAlarmThreshold, FractalAD
from anomalib_fractalad.build import part as part_module
from anomalib_fractalad.build.export_check import FP32, INT8, Comparison
from anomalib_fractalad.build.part import export_part
from anomalib_fractalad.export.threshold import set_threshold
from anomalib_fractalad.image_files import read_image
from anomalib_fractalad.inspection import Inspector, inspect_main

pytestmark = pytest.mark.slow

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "anomalib", "anomalib_fractalad", "cv2", "lightning"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Part(NamedTuple):
    folder: Path
    content: dict[str, Any]
    model: FractalAD


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory, tile_root: Path) -> Part:
    root = tmp_path_factory.mktemp("part")
    model = small_model("FractalAD", post_processor=FalseAlarmThreshold(0.2))
    datamodule = make_tiles(tile_root)
    small_engine(root, max_epochs=4).fit(model, datamodule=datamodule)
    (root / "part").mkdir()
    (root / "part" / "notes.txt").write_text("stays")
    content = export_part(model, datamodule, root / "part", extra={"note": "ü"})
    return Part(root / "part", content, model.eval())


def test_what_the_folder_holds(part: Part) -> None:
    content = json.loads((part.folder / "part.json").read_text(encoding="utf-8"))
    assert content == part.content
    assert (part.folder / "notes.txt").read_text() == "stays"
    assert content["false_alarms"] == part.model.post_processor.calibration
    assert content["image"]["size"] == [64, 64]
    assert content["extra"] == {"note": "ü"}
    assert all((part.folder / file).is_file() for file in (*content["files"].values(), "inspect.py"))
    check = content["check"]
    assert check["images"] == 4  # the good ones
    for name in (FP32, "onnx"):
        assert check[name]["decisions_changed"] == []
        assert max(check[name]["score"], check[name]["map"]) < 1e-3
    assert (part.folder / "model/int8.xml").read_text().count('element_type="u8"') or check[INT8]["map"] > 1e-5
    assert content["int8"]["taken"] == (not check[INT8]["decisions_changed"])
    chosen = INT8 if content["int8"]["taken"] else FP32
    assert content["network"] == content["files"][chosen]
    assert content["threshold"]["image"] == check[chosen]["threshold"]


def test_one_file_inspects_without_torch(part: Part, tmp_path: Path) -> None:
    """It reads odd images as training does, and goes on after those that cannot be read."""
    readable, unreadable = make_odd_images(tmp_path / "odd")
    turned = tmp_path / "odd" / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.tile(np.arange(0, 240, 3, dtype=np.uint8), (48, 1))).save(turned, exif=exif)
    for name in ("Thumbs.db", ".DS_Store", "._x.png"):
        (tmp_path / "odd" / name).write_bytes(b"none")
    folder = tmp_path / "part"
    shutil.copytree(part.folder, folder)
    (folder / "part.json").write_text(json.dumps({**part.content, "network": part.content["files"][FP32]}))
    script = folder / "inspect.py"
    done = subprocess.run(
        [sys.executable, "-c", BLOCK, script, tmp_path / "odd", "--format", "json", "--heat-maps", tmp_path / "maps"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=folder,
    )
    assert done.returncode == 2, done.stderr
    rows = {Path(row["image"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == {*readable, *unreadable, turned}
    for path, reason in unreadable.items():
        assert rows[path]["decision"] == "unreadable"
        assert reason in rows[path]["error"]
    for path in (*readable, turned):
        with torch.no_grad():
            expected = part.model(read_image(path, as_tensor=True)[None])
        assert rows[path]["score"] == pytest.approx(float(expected.pred_score), abs=2e-3), path
        assert rows[path]["error"] is None
        with Image.open(tmp_path / "maps" / f"{path.name}.png") as drawn, Image.open(path) as image:
            assert drawn.size == image.size
    # Beside it, Python still finds its own module of that name.
    code = "import inspect, dataclasses; assert inspect.signature"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)


def test_the_installed_command_is_the_same(
    part: Part, tile_root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status = inspect_main([str(part.folder), str(tile_root / "test"), "--format", "json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 8
    assert status == any(row["decision"] == "anomalous" for row in rows)
    inspector = Inspector(part.folder, network="model/fp32.xml")
    path = tile_root / "test/blot/000.png"
    large = tmp_path / "large.png"
    with Image.open(path) as image:
        image.resize((640, 320), Image.Resampling.NEAREST).save(large)
    prediction = inspector.predict(Image.open(path).convert("RGB"))
    with torch.no_grad():
        expected = part.model(read_image(path, as_tensor=True)[None])
    np.testing.assert_allclose(prediction["anomaly_map"], expected.anomaly_map[0, 0], atol=1e-3)
    assert np.array_equal(prediction["pred_mask"], expected.pred_mask[0, 0])
    # At a threshold of 0, everything is anomalous.
    row = Inspector(part.folder, threshold=0.0).inspect(large)
    assert row["decision"] == "anomalous"
    assert all(0 <= d["box"][0] < d["box"][2] <= 640 and 0 <= d["box"][1] < d["box"][3] <= 320 for d in row["defects"])


def test_thresholds_of_exported_networks(part: Part, tmp_path: Path) -> None:
    """An image that is the threshold itself raises no alarm where a runtime rounds it up."""
    images = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    for name in ("fp32.xml", "fp32.bin", "model.onnx", "model.onnx.data"):
        if (part.folder / "model" / name).exists():
            (tmp_path / name).write_bytes((part.folder / "model" / name).read_bytes())
    for threshold, label in ((0.0, True), (0.999, False)):
        set_threshold(tmp_path / "fp32.xml", threshold)
        set_threshold(tmp_path / "model.onnx", threshold)
        found = Core().compile_model(tmp_path / "fp32.xml", "CPU")(images)
        assert found["pred_label"].ravel().tolist() == [label]
        assert in_onnx_runtime(tmp_path / "model.onnx", images).pred_label.ravel().tolist() == [label]

    comparison = Comparison()
    torch_scores, scores = [0.2, 0.5, 0.6, 0.51], [0.3, 0.52, 0.53, 0.51]
    # By itself, an image that the threshold was found with may come out beside it, in torch as well.
    torch_scores += [0.499999, 0.500001, 0.500001]
    scores += [0.521, 0.45, 0.45]
    for ours, theirs in zip(torch_scores, scores, strict=True):
        comparison.add(
            {"pred_score": ours, "anomaly_map": np.zeros(2)}, {"pred_score": theirs, "anomaly_map": np.ones(2)}
        )
    expected = [
        {"path": str(i), "pred_score": score, "calibrates": i in {4, 5}} for i, score in enumerate(torch_scores)
    ]
    result = comparison.result(expected, 0.5)
    assert 0.521 < result["threshold"] < 0.5211
    assert result["decisions_changed"] == ["3", "6"]
    assert result["map"] == 1
    assert result["score"] == pytest.approx(0.1)


def test_int8_is_taken_only_if_it_keeps_the_decisions() -> None:
    choose = part_module._choose_int8
    check = {"images": 9, INT8: {"decisions_changed": ["a.png"]}}
    assert choose(check, wanted=True)["reason"] == "INT8 decides otherwise about 1 of 9 images: FP32 is used"
    assert not choose(check, wanted=True)["taken"]
    check[INT8]["decisions_changed"] = []
    assert choose(check, wanted=True)["taken"]
    assert not choose(check, wanted=False)["taken"]


def test_what_cannot_become_a_part(part: Part, tile_root: Path, tmp_path: Path) -> None:
    datamodule = make_tiles(tile_root)
    with pytest.raises(ValueError, match="has no thresholds"):
        export_part(small_model("FractalAD"), datamodule, tmp_path)
    with pytest.raises(ValueError, match="there are no images to check"):
        export_part(part.model, datamodule, tmp_path)  # which is not set up
    pre_processor, part.model.pre_processor = part.model.pre_processor, None
    try:
        with pytest.raises(ValueError, match="take a Resize to one height and width"):
            export_part(part.model, datamodule, tmp_path, [tile_root / "test/good/000.png"])
    finally:
        part.model.pre_processor = pre_processor
    with pytest.raises(FileNotFoundError, match="is no part folder"):
        Inspector(tmp_path)


def test_a_damaged_part_is_named(part: Part, tmp_path: Path) -> None:
    copy = tmp_path / "part"
    shutil.copytree(part.folder, copy)
    with pytest.raises(ValueError, match=r"--device NPUX cannot run .*\.xml; OpenVINO finds .*CPU"):
        Inspector(copy, "NPUX")
    for file in (copy / "model").glob("*.bin"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"\.xml, or the \.bin file beside it, is damaged: copy the part folder anew"):
        Inspector(copy)
    for content in ('{"format": 1,', "{}", "[]", ""):
        (copy / "part.json").write_text(content)
        with pytest.raises(ValueError, match=r"part.json is damaged .*: copy the part folder anew, or build it anew"):
            Inspector(copy)


def test_a_region_of_other_proportions_is_refused(part: Part, tmp_path: Path) -> None:
    inspector = Inspector(part.folder)
    inspector.part["roi"] = {"size": [64, 64], "share": 0.5}
    save(np.full((20, 30), 99), tmp_path / "wide.png")
    row = inspector.inspect(tmp_path / "wide.png")
    assert row["decision"] == "unreadable"
    assert "30x20 pixels, and the region of interest was drawn on 64x64" in row["error"]
