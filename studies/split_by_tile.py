# SPDX-License-Identifier: Apache-2.0
"""The magnetic tiles with no tile in both training and test: normal images dealt out anew, by tile.

python studies/split_by_tile.py --root PATH --output PATH

Each tile was photographed up to six times, one exposure (the number after "exp") after the other, and the number after
"num" grows from photograph to photograph.
"""

from pathlib import Path

from common import by_tile
from jsonargparse import auto_cli


def split_by_tile(root: Path, output: Path, gap: int = 100, every: int = 5, first: int = 0) -> None:
    """Link all images and masks of a data set into a new folder of the same layout.

    Args:
        root: The data set: train/good, test/good, test/<defect>, ground_truth/<defect>.
        output: A new folder.
        gap: Photographs whose numbers lie further apart are of different tiles. Neighbors closer than that are kept
            together, of one tile or of two.
        every: Of so many such groups, one goes to the test images.
        first: Which of them.
    """
    if output.exists():
        msg = f"{output} exists; name a new folder, so that no other split's images are mixed with these"
        raise ValueError(msg)
    normal = [*(root / "train" / "good").iterdir(), *(root / "test" / "good").iterdir()]
    groups = by_tile(normal, gap)
    for index, group in enumerate(groups):
        for file in group:
            link(file, output / ("test" if index % every == first else "train") / "good")
    for file in [*root.glob("test/*/*"), *root.glob("ground_truth/*/*")]:
        if file.parent.name != "good":
            link(file, output / file.parent.relative_to(root))
    parts = [{file.parent.parent.name for file in group} for group in groups]
    shared = sum(len(group) for group, part in zip(groups, parts, strict=True) if len(part) == 2)
    print(f"{len(groups)} groups of {len(normal)} normal images; {shared} of groups that were in training and test")
    print(*(f"{part}/good: {sum(1 for _ in (output / part / 'good').iterdir())}" for part in ("train", "test")))


def link(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).symlink_to(file.resolve())


if __name__ == "__main__":
    auto_cli(split_by_tile, as_positional=False)
