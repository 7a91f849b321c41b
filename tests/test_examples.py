# SPDX-License-Identifier: Apache-2.0
"""The examples, run as a user would, on small data."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ODD_FOLDER, make_odd_images
from PIL import Image

from anomalib_fractalad import SurfaceDefects
from anomalib_fractalad.data import surface_defects

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
CATEGORY = "metal_plate"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """SurfaceDefects with a few of its images."""
    root = tmp_path_factory.mktemp("data") / "SurfaceDefects"
    with pytest.MonkeyPatch.context() as patch:
        for name, number in {"_TRAIN_GOOD": 8, "_TEST_GOOD": 4, "_PER_DEFECT": 2}.items():
            patch.setattr(surface_defects, name, number)
        SurfaceDefects(root=root, category=CATEGORY).prepare_data()
        yield root


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Path:
    results = tmp_path_factory.mktemp("results")
    exported = load("train_predict_export").train_predict_export(
        category=CATEGORY,
        backbone="test_resnet",
        epochs=1,
        data_root=data_root,
        results=results,
        int8=True,
    )
    assert exported == results / "weights" / "openvino" / "model.xml"
    return results


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "generate_anomalies",
        "heat_map_sheet",
        "openvino_folder",
        "train_predict_export",
    }


def test_generate_anomalies(tile_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "anomalies.png"
    load("generate_anomalies").generate(images=tile_root / "train/good", output=output, count=4, size=64)
    sheet = Image.open(output)
    assert sheet.size == (4 * (64 + 2) + 2, 3 * (64 + 2) + 2)
    assert len(sheet.convert("L").getcolors(maxcolors=256) or []) > 10


def test_train_predict_export(results: Path) -> None:
    assert (results / "weights" / "openvino" / "model.bin").stat().st_size > 0
    assert list(results.rglob("model.ckpt"))


def test_openvino_folder(
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each image has a heat map of its own, and what cannot be read, or is a heat map, is passed over."""
    good, bad = make_odd_images(tmp_path / ODD_FOLDER)
    for suffix in (".bmp", ".jpg"):  # names that differ by their endings alone
        good.append((tmp_path / ODD_FOLDER / "gray.png").with_suffix(suffix))
        Image.new("RGB", (48, 32)).save(good[-1])
    monkeypatch.chdir(tmp_path / ODD_FOLDER)
    before = set(Path().iterdir())
    for _ in range(2):
        load("openvino_folder").inspect(model=results / "weights/openvino/model.xml", images=Path())
        printed = capsys.readouterr()
        assert [line.partition("  ")[2].split("  ")[-1].strip() for line in printed.out.splitlines()] == [
            str(path) for path in sorted(good)
        ]
        assert all(f"skipped: {path}" in printed.err for path in bad)
    assert set(Path().iterdir()) - before == {Path("heat_maps")}
    assert {path.name for path in Path("heat_maps").iterdir()} == {f"{path.name}.png" for path in good}
    assert Image.open("heat_maps/gray.bmp.png").size == (48, 32)
    with pytest.raises(ValueError, match=r"lie in .*heat_maps, the folder of the heat maps: choose another"):
        load("openvino_folder").inspect(model=results / "weights/openvino/model.xml", images=Path("heat_maps"))


def test_heat_map_sheet(results: Path, data_root: Path, tmp_path: Path) -> None:
    category = data_root / CATEGORY
    images = sorted((category / "test" / "dent").glob("*.png"))[:2]
    masks = sorted((category / "ground_truth" / "dent").glob("*.png"))[:2]
    checkpoint = next(iter(sorted(results.rglob("model.ckpt"))))
    output = tmp_path / "sheet.png"
    load("heat_map_sheet").draw_sheet(checkpoint=checkpoint, images=images, masks=masks, output=output, size=128)
    assert Image.open(output).size == (2 * 128, 3 * 128)
