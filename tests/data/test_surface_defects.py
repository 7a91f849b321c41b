# SPDX-License-Identifier: Apache-2.0
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.data import AnomalibDataModule
from PIL import Image

from anomalib_fractalad.data import SurfaceDefects, surface_defects
from anomalib_fractalad.data._painters import PAINTERS, paint

MANIFEST = "surface_defects.json"
DEFECTS = [(category, defect) for category, painter in PAINTERS.items() for defect in painter.DEFECTS]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def full_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("full") / "not yet there"
    SurfaceDefects(root, "metal_plate").prepare_data()
    return root


FEW = {"_TRAIN_GOOD": 3, "_TEST_GOOD": 2, "_PER_DEFECT": 1}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in FEW.items():
        monkeypatch.setattr(surface_defects, name, number)


@pytest.fixture
def written(tmp_path: Path, few: None) -> tuple[SurfaceDefects, Path, dict[str, bytes]]:  # noqa: ARG001
    data = SurfaceDefects(tmp_path, "metal_plate")
    data.prepare_data()
    return data, tmp_path / "metal_plate", contents(tmp_path / "metal_plate")


def test_layout_is_mvtecs(full_root: Path) -> None:
    folder = full_root / "metal_plate"
    names = sorted(name for name in contents(folder) if name != MANIFEST)
    assert sum(name.startswith("train/good/") for name in names) == 60
    assert sum(name.startswith("test/good/") for name in names) == 20
    for defect in ("contamination", "dent", "scratch", "stain"):
        assert [f"test/{defect}/{i:03}.png" for i in range(10)] == [n for n in names if n.startswith(f"test/{defect}/")]
        assert all(f"ground_truth/{defect}/{i:03}_mask.png" in names for i in range(10))
    assert len(names) == 160
    assert sorted(path.name for path in full_root.iterdir() if not path.name.endswith(".lock")) == ["metal_plate"]


def test_files_are_rgb_images_and_binary_masks(full_root: Path) -> None:
    for path in (full_root / "metal_plate").rglob("*.png"):
        with Image.open(path) as image:
            is_mask = path.name.endswith("_mask.png")
            assert (image.format, image.size, image.mode) == ("PNG", (256, 256), "L" if is_mask else "RGB")
            if is_mask:
                assert np.unique(image).tolist() == [0, 255]


def test_setup_gives_batches_with_masks(full_root: Path) -> None:
    data = SurfaceDefects(full_root, "metal_plate", eval_batch_size=60, val_split_mode="from_test", seed=0)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (60, 30, 30)
    assert next(iter(data.train_dataloader())).image.shape == (16, 3, 256, 256)
    batch = next(iter(data.test_dataloader()))
    assert batch.gt_mask.shape == (30, 256, 256)
    assert torch.equal(batch.gt_mask.flatten(1).any(1), batch.gt_label)


@pytest.mark.parametrize("name", ["SurfaceDefects", "anomalib_fractalad.data.SurfaceDefects"])
def test_command_line_finds_it(name: str, tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    arguments = {"root": str(tmp_path / "data"), "category": "molded_part", "num_workers": 1}
    config.write_text(yaml.safe_dump({"class_path": name, "init_args": arguments}))
    data = AnomalibDataModule.from_config(config, **{"data.train_batch_size": 5})
    assert isinstance(data, SurfaceDefects)
    assert (data.category, data.num_workers, data.train_batch_size) == ("molded_part", 1, 5)
    assert data.root == tmp_path / "data"


@pytest.mark.slow
def test_two_processes_at_once_write_what_one_writes(
    tmp_path: Path, written: tuple[SurfaceDefects, Path, dict[str, bytes]]
) -> None:
    code = (
        "import sys, torch; torch.manual_seed(int(sys.argv[2]));"
        "from anomalib_fractalad.data import SurfaceDefects, surface_defects;"
        f"vars(surface_defects).update({FEW});"
        "SurfaceDefects(sys.argv[1], 'metal_plate').prepare_data()"
    )
    root = tmp_path / "shared root"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(root), str(threads)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        for threads in (1, 3)
    ]
    assert [process.wait(timeout=500) for process in processes] == [0, 0]
    assert contents(root / "metal_plate") == written[2]
    assert not (root / ".metal_plate.part").exists()


@pytest.mark.usefixtures("few")
def test_global_random_state_is_neither_used_nor_changed(tmp_path: Path) -> None:
    written = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()  # noqa: NPY002
        SurfaceDefects(tmp_path / str(seed), "metal_plate").prepare_data()
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (str(np.random.get_state()), random.getstate())  # noqa: NPY002
        written.append(contents(tmp_path / str(seed) / "metal_plate"))
    assert written[0] == written[1]


@pytest.mark.parametrize("damage", ["delete", "truncate", "empty", "delete_mask", "delete_folder"])
def test_damaged_files_are_restored(
    damage: str,
    written: tuple[SurfaceDefects, Path, dict[str, bytes]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, folder, original = written
    if damage == "delete":
        (folder / "train/good/001.png").unlink()
    elif damage == "truncate":
        (folder / "test/dent/000.png").write_bytes(original["test/dent/000.png"][:5000])
    elif damage == "empty":
        (folder / "test/good/001.png").write_bytes(b"")
    elif damage == "delete_mask":
        (folder / "ground_truth/scratch/000_mask.png").unlink()
    else:
        shutil.rmtree(folder / "test")
    untouched = (folder / "train/good/000.png").stat().st_mtime_ns
    data.setup()
    assert contents(folder) == original
    assert (folder / "train/good/000.png").stat().st_mtime_ns == untouched
    assert "Restoring" in caplog.text


@pytest.mark.parametrize("manifest", [b"", b'{"edition": 1, "fi', b"[]", b'{"edition": 0, "files": {}}'])
def test_torn_or_outdated_manifest_is_written_anew(
    manifest: bytes, written: tuple[SurfaceDefects, Path, dict[str, bytes]]
) -> None:
    data, folder, original = written
    (folder / MANIFEST).write_bytes(manifest)
    (folder / "train/good/000.png").write_bytes(b"older")
    data.prepare_data()
    assert contents(folder) == original


@pytest.mark.usefixtures("few")
def test_interrupted_writing_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SurfaceDefects(tmp_path, "metal_plate")
    with monkeypatch.context() as patch:

        def interrupted(category: str, seed: tuple[int, ...], *args: object) -> object:
            if seed == (1, 1):
                raise KeyboardInterrupt
            return paint(category, seed, *args)

        patch.setattr(surface_defects, "paint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert not (tmp_path / "metal_plate").exists()
    assert any((tmp_path / ".metal_plate.part").rglob("*.png"))
    data.setup()
    assert len(data.train_data) == 3
    assert not (tmp_path / ".metal_plate.part").exists()


@pytest.mark.usefixtures("few")
def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "metal_plate").mkdir()
    SurfaceDefects(tmp_path, "metal_plate").prepare_data()
    assert (tmp_path / "metal_plate/train/good/002.png").is_file()


def test_other_peoples_folder_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "fabric/train/good/000.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"fabric holds files that SurfaceDefects did not write.*another root"):
        SurfaceDefects(tmp_path, "fabric").prepare_data()
    assert contents(tmp_path) == {"fabric/train/good/000.png": b"mine"}


def test_unknown_category_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'leather'.*fabric, metal_plate, molded_part"):
        SurfaceDefects(tmp_path, "leather")
    assert SurfaceDefects(tmp_path, "moulded_part").category == "molded_part"  # as configs of earlier releases spell it


def test_default_root_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert SurfaceDefects().root == Path("datasets/SurfaceDefects")
    assert SurfaceDefects(root=None).root.name == "SurfaceDefects"
    assert SurfaceDefects(root=None).root.is_absolute()


@pytest.mark.parametrize(("category", "defect"), DEFECTS)
def test_masks_are_where_the_defect_shows(category: str, defect: str) -> None:
    for severity in (0.15, 1.0):
        sample = paint(category, (9, 9), defect, severity)
        inside = sample.mask > 0
        assert 20 < inside.sum() < 0.1 * inside.size
        change = np.abs(sample.image.astype(int) - sample.twin).max(-1)
        assert not change[~inside].any()
        assert change[inside].mean() > 4
        assert (change[inside] > 0).mean() > 0.85


@pytest.mark.parametrize("category", list(PAINTERS))
def test_images_vary_and_are_well_exposed(category: str) -> None:
    first, second = (paint(category, (0, i)).image.astype(int) for i in range(2))
    assert np.abs(first - second).mean() > 2
    assert np.array_equal(first, paint(category, (0, 0)).image)
    for image in (first, second):
        assert (image == 255).mean() < 0.001
        assert (image == 0).mean() < 0.001
        assert image.std() > 5
