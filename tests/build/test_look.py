# SPDX-License-Identifier: Apache-2.0
"""A first look at folders as people have them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from PIL import Image

from anomalib_fractalad.build import look as looking
from anomalib_fractalad.build.look import Look, look
from anomalib_fractalad.build.split import data_module, images_needed, split

SIZE = 64


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def texture(random: np.random.Generator) -> np.ndarray:
    return 120 + 40 * np.sin(np.arange(SIZE) / 2 + random.uniform(0, 6)) + random.normal(0, 12, (SIZE, SIZE))


def parts_together(found: Look, *groups: set[str]) -> bool:
    part_of = {file.name: part for file, part in zip(found.files, found.grouping.part_of, strict=True)}
    return all(len({part_of[name] for name in group}) == 1 for group in groups)


def test_a_folder_as_people_have_them(tmp_path: Path, random: np.random.Generator) -> None:
    folder = tmp_path / "good"
    for index in range(20):
        save(texture(random), folder / "monday" / f"{index:02}.png")
    for name in ("Thumbs.db", ".DS_Store", "._00.png", "notes.txt"):
        (folder / name).write_bytes(b"nothing")
    (folder / ".hidden").mkdir()
    save(texture(random), folder / ".hidden" / "00.png")
    (folder / "empty.png").write_bytes(b"")
    shutil.copy(folder / "monday/03.png", folder / "copy of 03.png")
    again = np.asarray(Image.open(folder / "monday/05.png"), dtype=float)
    save(0.8 * again + 10 + random.normal(0, 3, again.shape), folder / "05 darker.png")
    turned = Image.fromarray(texture(random).clip(0, 255).astype(np.uint8)).convert("RGB").resize((120, 90))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "phone.jpg", exif=exif)
    save(np.zeros((SIZE, SIZE)), folder / "black.png")

    found = look(folder)
    assert {file.name for file in found.files} == {
        *(f"{index:02}.png" for index in range(20) if index != 3),
        "copy of 03.png",
        "05 darker.png",
        "phone.jpg",
        "black.png",
    }
    assert [file.name for file in found.unreadable] == ["empty.png"]
    assert [[file.name for file in group] for group in found.duplicates] == [["copy of 03.png", "03.png"]]
    assert parts_together(found, {"05.png", "05 darker.png"})
    assert found.parts == len(found.files) - 1
    assert (found.kind, found.size, found.is_gray) == ("texture", (SIZE, SIZE), True)
    text = "\n".join(found.summary())
    for said in ("empty.png is empty", "1 files repeat", "turned (EXIF), such as phone.jpg", "Proportions differ"):
        assert said in text
    assert "nearly all dark, such as black.png" in text
    assert "Pixel formats differ" in text


@pytest.mark.parametrize(
    ("names", "how"),
    [
        ([f"part{part:02}_{view}" for part in range(12) for view in ("front", "back")], "common stem"),
        ([f"plate {part:02} ({shot})" for part in range(12) for shot in (1, 2)], "common stem"),
        ([f"{part:02}/{shot}" for part in range(12) for shot in "ab"], "folders"),
    ],
)
def test_names_tell_parts(tmp_path: Path, random: np.random.Generator, names: list[str], how: str) -> None:
    for name in names:
        save(texture(random), tmp_path / f"{name}.png")
    found = look(tmp_path)
    assert found.parts == 12
    assert how in found.grouping.how
    dealt = split(found, 0.2)
    places = [
        {found.grouping.part_of[found.files.index(file)] for file in files}
        for files in vars(dealt).values()
        if isinstance(files, tuple) and files and isinstance(files[0], Path)
    ]
    assert sum(map(len, places)) == len(set.union(*places)) == 12


@pytest.mark.parametrize("name", ["IMG_{:04}", "{:03}", "20240102_{:06}", "exp1_num_{}"])
def test_numbered_images_are_parts_of_their_own(tmp_path: Path, random: np.random.Generator, name: str) -> None:
    for index in range(24):
        save(texture(random), tmp_path / f"{name.format(index)}.png")
    assert look(tmp_path).parts == 24


def test_groups_by_a_regular_expression(tmp_path: Path, random: np.random.Generator) -> None:
    for index in range(24):
        save(texture(random), tmp_path / f"{index:02}-p{index % 8}.png")
    assert look(tmp_path, r"-(p\d)").parts == 8
    with pytest.raises(ValueError, match=r"--group 'x\+' matches no image, such as 00-p0.png"):
        look(tmp_path, "x+")
    with pytest.raises(ValueError, match="--group '\\(' is no regular expression"):
        look(tmp_path, "(")


def test_an_object_and_two_sides_of_it(tmp_path: Path, random: np.random.Generator) -> None:
    for index in range(40):
        image = random.normal(40, 2, (SIZE, SIZE))
        image[20:44, 20:44] = random.normal(160 if index % 4 else 90, 4, (24, 24))
        save(image, tmp_path / f"{index:02}.png")
    found = look(tmp_path)
    assert found.kind == "object"
    assert sorted((sum(found.side), 40 - sum(found.side))) == [10, 30]
    assert any("two kinds, 30 and 10" in warning for warning in found.warnings)
    dealt = split(found, 0.1)
    side_of = dict(zip(found.files, found.side, strict=True))
    for files in (dealt.train, dealt.held, dealt.calibration):
        assert 0.1 <= sum(side_of[file] == side_of[found.files[0]] for file in files) / len(files) <= 0.45


def test_a_large_folder_is_looked_at_in_part(
    tmp_path: Path, random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(30):
        save(texture(random), tmp_path / f"{index:02}.png")
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    monkeypatch.setattr(looking, "_BYTES", total // 3)
    (tmp_path / "07.png").write_bytes((tmp_path / "07.png").read_bytes()[:500])
    found = look(tmp_path)
    assert found.looked_at < 12
    assert [file.name for file in found.unreadable] == ["07.png"]
    assert len(found.files) == 29


def test_too_few_images(tmp_path: Path, random: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="holds no image"):
        look(tmp_path)
    with pytest.raises(ValueError, match="does not exist; give the folder"):
        look(tmp_path / "missing")
    for index in range(30):
        save(texture(random), tmp_path / f"{index:02}.png")
    found = look(tmp_path)
    with pytest.raises(ValueError, match=r"30 good images, .* --false-alarms 0.063, or take 198 images for 0.01"):
        split(found, 0.01)
    with pytest.raises(ValueError, match=r"--false-alarms is 1\.5"):
        split(found, 1.5)
    for rate in (None, 0.063):
        dealt = split(found, rate, seed=3)
        assert dealt == split(found, rate, seed=3) != split(found, rate, seed=4)
        assert len(dealt.calibration) >= images_needed(dealt.false_alarms)
        assert sorted([*dealt.train, *dealt.held, *dealt.calibration]) == sorted(found.files)
    assert "198" in split(found).warnings[0]
    for file in found.files[19:]:
        file.unlink()
    with pytest.raises(ValueError, match="19 good images are too few; take at least 20"):
        split(look(tmp_path))


@pytest.mark.parametrize("others", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_all_images_to_train_on_are_trained_on(
    tmp_path: Path, random: np.random.Generator, others: tuple[int, int]
) -> None:
    """anomalib takes some of them to test on where there are no good images for that."""
    train, good, bad = ([tmp_path / f"{kind}{i}.png" for i in range(count)] for kind, count in enumerate((6, *others)))
    for file in (*train, *good, *bad):
        save(random.integers(0, 256, (16, 16, 3)), file)
    data = data_module(train, good, bad)
    data.prepare_data()
    data.setup()
    assert [Path(item.image_path) for item in data.train_data] == train
    assert {Path(item.image_path) for item in data.test_data} == {*good, *bad}
