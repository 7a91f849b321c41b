# SPDX-License-Identifier: Apache-2.0
"""What a build is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from .candidates import BACKBONE
from .files import fingerprint, image_files

Threshold = Literal["false-alarms", "f1"]

WORK = "work"


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        good: Folder of good images.
        output: Folder of the part, which is written.
        bad: Folder of bad images, for the report; they never move the threshold, unless ``threshold`` is ``f1``. A
            sub-folder named ``good`` does not count.
        minutes: Time to choose and train in, about.
        false_alarms: Share of good images that may raise an alarm; left out, see :func:`~.split.split`.
        roi: Mask of the region of interest.
        group: Regular expression that finds the name of an image's part in its path.
        seed: Seed of all random numbers.
        threshold: ``false-alarms``, from good images alone, or ``f1``, best F1 score on good and bad images.
        candidates: File of candidates in place of the package's.
        backbone: Teacher of all candidates, a CNN of timm.
        pre_trained: Whether the teacher has ImageNet weights.
        weights: Local file of the teacher's weights.
        accelerator: Where models train.
        effort: Share of whole trainings to make, in place of what the time allows: the same share and seed give the
            same model on a machine of another speed.
        int8: Whether to make an INT8 model, too.
    """

    good: Path
    output: Path
    bad: Path | None = None
    minutes: float = 30
    false_alarms: float | None = None
    roi: Path | None = None
    group: str | None = None
    seed: int = 0
    threshold: Threshold = "false-alarms"
    candidates: Path | None = None
    backbone: str = BACKBONE
    pre_trained: bool = True
    weights: Path | None = None
    accelerator: str = "auto"
    effort: float | None = None
    int8: bool = True

    def check(self) -> None:
        """Refuse what cannot be built, before any work.

        Raises:
            ValueError: The message names the option and the fix.
        """
        if not self.minutes > 0:
            msg = f"--minutes is {self.minutes:g}; give a time above 0, such as 30"
            raise ValueError(msg)
        if self.effort is not None and not 0 < self.effort <= 1:
            msg = f"--effort is {self.effort:g}; give a share above 0 and at most 1"
            raise ValueError(msg)
        if self.threshold not in get_args(Threshold):
            msg = f"--threshold is {self.threshold!r}; give one of {', '.join(get_args(Threshold))}"
            raise ValueError(msg)
        if self.threshold == "f1" and self.bad is None:
            msg = "--threshold f1 takes bad images: give their folder with --bad"
            raise ValueError(msg)
        for option, file in (("--roi", self.roi), ("--weights", self.weights), ("--candidates", self.candidates)):
            if file is not None and not file.is_file():
                msg = f"{option} {file} does not exist; give the path of a file"
                raise ValueError(msg)
        if self.output.exists() and not self.output.is_dir():
            msg = f"--output {self.output} is a file; give a folder"
            raise ValueError(msg)
        has_others = self.output.is_dir() and any(item.name != WORK for item in self.output.iterdir())
        if has_others and not (self.output / WORK / "state.json").exists():
            msg = f"--output {self.output} holds files that are of no build; give a new folder"
            raise ValueError(msg)

    def files(self, folder: Path) -> list[Path]:
        """The images of a folder, but what this build writes, and good ones beside bad ones."""
        return image_files(folder, [self.output] if folder != self.bad else [self.output, folder / "good"])

    def plain(self) -> dict[str, Any]:
        """What a second call must ask for again to go on, and the state of the images."""
        values = {name: value for name, value in vars(self).items() if name != "output"}
        folders = {"good images": self.good, "bad images": self.bad}
        states = {name: fingerprint(self.files(folder)) for name, folder in folders.items() if folder is not None}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()} | states
