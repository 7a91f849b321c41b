# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

import anomalib_fractalad

SIZE = 64
# A processor with bfloat16 would make OpenVINO compute in it.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}

torch.set_num_threads(1)  # the tests' networks are tiny: threads cost more than they gain


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is slow: begun last, it would keep one process busy while the others are done."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, item.path.name != "test_export.py"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tile_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in MVTec's layout: plates with fine stripes, and dark blots as defects."""
    root = tmp_path_factory.mktemp("tiles")
    random = np.random.default_rng(0)
    for folder, count, defective in (("train/good", 8, False), ("test/good", 4, False), ("test/blot", 4, True)):
        for i in range(count):
            image = 120 + 40 * np.sin(np.arange(SIZE) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (SIZE, SIZE))
            mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
            if defective:
                row, column = random.integers(8, SIZE - 24, size=2)
                mask[row : row + 16, column : column + 16] = 255
                image = np.where(mask > 0, 20, image)
            save(image, root / folder / f"{i:03}.png")
            if defective:
                save(mask, root / "ground_truth/blot" / f"{i:03}.png")
    return root


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def tiles(tile_root: Path) -> Folder:
    return make_tiles(tile_root)


def tile_arguments(root: Path) -> dict[str, Any]:
    """Arguments of anomalib's Folder for the tiles, as plain data."""
    return {
        "name": "tiles",
        "root": str(root),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/blot",
        "mask_dir": "ground_truth/blot",
        "num_workers": 0,
        "val_split_mode": "same_as_test",
    }


def make_tiles(root: Path, num_workers: int = 0) -> Folder:
    return Folder(**{**tile_arguments(root), "num_workers": num_workers}, train_batch_size=4, eval_batch_size=4)


def run_script(script: Path, *arguments: Path) -> None:
    """Run a script of the tests in a process of its own, with the tests' modules at hand."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "models")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def small_engine(root: Path, **arguments: Any) -> Engine:
    defaults = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=root, **{**defaults, **arguments})


def small_model(name: str, **arguments: Any) -> Any:
    extra = {"ADPS": {"patches": 2}, "FractalMemory": {"head": True}}.get(name, {})
    kind = getattr(anomalib_fractalad, name)
    size = {"pre_processor": kind.configure_pre_processor((64, 64))}
    return kind(**{"backbone": "test_resnet", "pre_trained": False, "visualizer": False, **extra, **size, **arguments})


@contextmanager
def one_program() -> Iterator[None]:
    """Convert a network to ONNX, the slow part of most exports and the same each time, once for all of them."""
    programs: dict[Any, Any] = {}
    convert = torch.onnx.export

    def convert_once(model: Any, args: Any, f: Any, **arguments: Any) -> Any:
        state = hashlib.sha256(b"".join(pickle.dumps(value) for value in model.state_dict().values())).digest()
        shapes = [value.shape for value in args if isinstance(value, torch.Tensor)]
        key = (id(model), str(model), state, str(shapes), str(sorted(arguments.items())))
        if key in programs:
            programs[key].save(f, external_data=True)
        else:
            programs[key] = convert(model=model, args=args, f=f, **arguments)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.onnx.export", convert_once)
        yield


def assert_same_weights(one: Any, other: Any) -> None:
    for (name, ours), theirs in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def in_onnx_runtime(file: Path, images: np.ndarray | torch.Tensor) -> SimpleNamespace:
    session = onnxruntime.InferenceSession(file)
    names = [output.name for output in session.get_outputs()]
    return SimpleNamespace(**dict(zip(names, session.run(None, {"input": np.asarray(images)}), strict=True)))


def assert_same_prediction(prediction: Any, reference: Any) -> None:
    """Maps and scores at most 1e-3 apart, and the same label."""
    for name in ("anomaly_map", "pred_score"):
        ours, theirs = (torch.as_tensor(getattr(result, name)).squeeze() for result in (prediction, reference))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0, check_stride=False)
    ours, theirs = (torch.as_tensor(result.pred_label).flatten() for result in (prediction, reference))
    assert torch.equal(ours, theirs)


ODD_FOLDER = "odd images 部品 ящик é"  # spaces and letters that are not Latin


def make_odd_images(folder: Path, *, large: bool = False) -> tuple[list[Path], dict[Path, str]]:
    """Images that are not like the others.

    Args:
        folder: Where they are written; made if it is not there.
        large: Also make one of 6000x4000, which takes a second to read.

    Returns:
        Those that can be read, and those that cannot with what is wrong, as part of an error's message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)

    def stripes(height: int, width: int) -> np.ndarray:
        return 120 + 60 * np.sin(np.arange(width) / 2) + random.normal(0, 6, (height, width))

    gray = Image.fromarray(stripes(48, 80).astype(np.uint8))
    deep = Image.fromarray((257 * stripes(48, 80)).astype(np.uint16))
    color = Image.merge("RGB", [gray, gray.rotate(180), gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    transparent = color.copy()
    transparent.putalpha(gray)
    images = {
        "gray.png": gray,
        "gray and alpha.png": transparent.convert("LA"),
        "color.bmp": color,
        "rgba.png": transparent,
        "palette.png": color.quantize(16),
        "color.webp": color,
        "bilevel.png": gray.convert("1"),
        "cmyk.jpg": color.convert("CMYK"),
        "16 bits.png": deep,
        "16 bits.tif": deep,
        "16 bits.pgm": deep,
        "one pixel.png": Image.new("RGB", (1, 1), (200, 100, 50)),
        "line.png": Image.fromarray(stripes(1, 3000).astype(np.uint8)),
        "column.png": Image.fromarray(stripes(1, 3000).astype(np.uint8).T),
        "strip.png": Image.fromarray(stripes(7, 1500).astype(np.uint8)),
        "black.png": Image.new("RGB", (64, 64), "black"),
        "white.png": Image.new("RGB", (64, 64), "white"),
        "деталь 部品 é.png": color,
        "CAPITALS.JPG": color,
    }
    if large:
        images["6000x4000.jpg"] = Image.fromarray(np.tile(color, (84, 75, 1))[:4000, :6000])
    for name, image in images.items():
        image.save(folder / name)

    unreadable = {
        "cut off.png": ("truncated", (folder / "rgba.png").read_bytes()[:2000]),
        "cut off.jpg": ("truncated", (folder / "CAPITALS.JPG").read_bytes()[:900]),
        "text.png": ("no image", b"This is a text.\n"),
        "empty.png": ("empty", b""),
    }
    for name, (_, contents) in unreadable.items():
        (folder / name).write_bytes(contents)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    bad = {folder / name: reason for name, (reason, _) in unreadable.items()} | {folder / "bomb.png": "too large"}
    return [folder / name for name in images], bad
