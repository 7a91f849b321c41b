# SPDX-License-Identifier: Apache-2.0
"""From a folder of good images to a part: the pieces, the whole, and the program."""

import contextlib
import io
import json
import re
import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import InferenceBatch
from conftest import save
from filelock import FileLock
from torchvision.transforms.v2 import Resize

from anomalib_fractalad import FractalMemory
from anomalib_fractalad.__main__ import main
from anomalib_fractalad.build import DEFECTS, build_part, pipeline
from anomalib_fractalad.build.choose import CHOOSING, TRAINING, Plan, make_plan, rungs
from anomalib_fractalad.build.evaluation import evaluate, is_tie
from anomalib_fractalad.build.look import look
from anomalib_fractalad.build.state import Progress
from anomalib_fractalad.build.trials import Trial, make_trials
from anomalib_fractalad.image_files import read_mask
from anomalib_fractalad.post_processing import OrderPreservingPostProcessor

pytestmark = pytest.mark.slow

GROUPS = ("good", "bad", "synthetic")
CANDIDATES = """
- name: fine
  model: {class_path: FractalAD, init_args: {distillation: false, learning_rate: 0.004}}
  steps: 24
  batch_size: 4
  size: 64
  scores: [top, max]
  trains_on: [fractal, faint fractal]
- name: broken
  model: {class_path: FractalAD, init_args: {backbone: no_such_backbone}}
  steps: 24
- name: with edges
  model: {class_path: FractalAD, init_args: {distillation: false, position_margin: 0.0}}
  steps: 24
  batch_size: 4
  size: 64
  scores: [top, mean]
"""


def make_folder(root: Path, good: int = 48, bad: int = 4) -> Path:
    """Plates with fine stripes as people have them: with files that are no images, and some that cannot be read."""
    random = np.random.default_rng(0)
    for folder, count in (("good", good), ("bad/blot", bad)):
        for index in range(count):
            image = 120 + 40 * np.sin(np.arange(64) / 2 + random.uniform(0, 6)) + random.normal(0, 6, (64, 64))
            if folder != "good":
                row, column = random.integers(8, 40, size=2)
                image[row : row + 14, column : column + 14] = 20
            save(image, root / folder / f"{index:03}.png")
    for name in ("Thumbs.db", ".DS_Store", "._000.png"):
        (root / "good" / name).write_bytes(b"no image")
    (root / "good" / "broken.png").write_bytes(b"no image")
    (root / "candidates.yaml").write_text(CANDIDATES)
    return root


def options(root: Path, **others: Any) -> dict[str, Any]:
    """Options of a small build."""
    small = {"backbone": "test_resnet", "pre_trained": False, "accelerator": "cpu", "effort": 1.0, "int8": False}
    return {**small, "bad": root / "bad", "candidates": root / "candidates.yaml", **others}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A part that was built, and what was told meanwhile; all of this module's builds make few defects."""
    root = make_folder(tmp_path_factory.mktemp("part"))
    told: list[str] = []

    class Told(Progress):
        def line(self, text: str) -> None:
            told.append(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_TRIALS", 40)
        patch.setattr(pipeline, "_SHOWN_TRIALS", 20)
        report = build_part(root / "good", root / "part1", **options(root), progress=Told(None))
        yield SimpleNamespace(root=root, part=root / "part1", report=report, told=told)


def report_content(report: Path) -> dict[str, Any]:
    found = re.search(
        r'type="application/json" id="content">(.*?)</script>', report.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found
    return json.loads(found[1])


def main_output(words: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(words) == 0
    return output.getvalue()


def test_the_part_is_whole(built: SimpleNamespace) -> None:
    files = {path.name for path in built.part.iterdir()}
    assert files >= {"anomalib.yaml", "inspect.py", "model", "part.json", "report.html", "work"}
    part = json.loads((built.part / "part.json").read_text())
    state = json.loads((built.part / "work/state.json").read_text())
    rows = state["choice"]["rows"]
    assert part["extra"]["candidate"] == state["choice"]["chosen"] in {"fine", "with edges"}
    assert "no_such_backbone" in rows["broken"]["failed"]
    for name in ("fine", "with edges"):
        outcome = rows[name]["outcome"]
        assert set(outcome["by_kind"]) <= set(DEFECTS)
        assert len(outcome["by_kind"]) >= 8
        assert len(outcome["by_source"]) == 8
        assert outcome["standard_error"] > 0
    assert state["choice"]["left_out"] == ["faint fractal", "fractal"]
    assert part["false_alarms"]["images"] == 16
    assert any("1 files cannot be read" in line for line in built.told)
    assert any("takes 198" in line for line in built.told)
    text = main_output(["status", str(built.part)])
    assert "report written: yes" in text
    assert "broken: ValueError" in text


def test_good_images_of_the_report_are_those_that_calibrated(built: SimpleNamespace) -> None:
    content = report_content(built.report)
    by_group = {group: [row for row in content["images"] if row["group"] == group] for group in GROUPS}
    assert len(by_group["good"]) == 16
    assert len(by_group["bad"]) == 4
    assert max(row["score"] for row in by_group["good"]) == pytest.approx(0.5, abs=1e-5)
    samples = yaml.safe_load((built.part / "anomalib.yaml").read_text())["data"]["init_args"]["samples"]
    split_of = dict(zip(samples["image_path"], samples["split"], strict=True))
    assert {split_of[str(built.root / "good" / row["name"])] for row in by_group["good"]} == {"test"}
    assert samples["split"].count("train") == 32
    shown = [row for row in content["images"] if "image" in row]
    assert all(row["image"].startswith("data:image/jpeg") and row["map"].startswith("data:image/") for row in shown)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Stopping(Progress):
    """Ctrl-C at a step."""

    def __init__(self, at: str) -> None:
        super().__init__(None)
        self._at = at

    def step(self, text: str, seconds_left: float | None = None) -> None:
        del seconds_left
        if text.startswith(self._at):
            raise KeyboardInterrupt


@pytest.fixture
def _no_export(built: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take most of the time, and are tested by the part that is whole."""
    part = json.loads((built.part / "part.json").read_text())
    monkeypatch.setattr(pipeline, "export_part", lambda *_args, **_options: part)


@pytest.mark.usefixtures("_no_export")
def test_stopped_it_goes_on_and_comes_to_the_same(built: SimpleNamespace) -> None:
    handler = signal.getsignal(signal.SIGINT)
    given = {**options(built.root), "output": built.root / "part2"}
    for place in ("round 1 of 1: with edges, step 9", "step 17"):
        with pytest.raises(KeyboardInterrupt):
            build_part(built.root / "good", **given, progress=Stopping(place))
        assert signal.getsignal(signal.SIGINT) is handler
    build_part(built.root / "good", **given, progress=Progress(None))
    assert_same(built.part / "work" / "model.ckpt", built.root / "part2" / "work" / "model.ckpt")
    ours, theirs = (report_content(built.root / name / "report.html")["images"] for name in ("part1", "part2"))
    assert [row["score"] for row in ours] == [row["score"] for row in theirs]

    with pytest.raises(ValueError, match=r"part2 holds a build of something else \(seed was 0 and is 1\).*--restart"):
        build_part(built.root / "good", **given, seed=1)


def test_anomalib_trains_the_same_model(built: SimpleNamespace, tmp_path: Path) -> None:
    AnomalibCLI(["fit", "--config", str(built.part / "anomalib.yaml"), "--default_root_dir", str(tmp_path)])
    (checkpoint,) = tmp_path.glob("FractalAD/*/v0/weights/lightning/model.ckpt")
    assert_same(built.part / "work/model.ckpt", checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "--minutes is 0; give a time above 0"),
        ({"effort": 2.0}, "--effort is 2; give a share above 0 and at most 1"),
        ({"threshold": "f1", "bad": None}, "--threshold f1 takes bad images: give their folder with --bad"),
        ({"threshold": "best"}, "--threshold is 'best'; give one of false-alarms, f1"),
        ({"roi": Path("no.png")}, "--roi no.png does not exist; give the path of a file"),
        ({"false_alarms": 0.001}, "48 good images, .* give --false-alarms 0.04, or take 1998 images for 0.001"),
        ({"bad": Path("no folder")}, "no folder does not exist; give the folder that holds the images"),
        ({"candidates": Path(__file__)}, "the candidates cannot be read"),
    ],
)
def test_mistakes(built: SimpleNamespace, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_part(built.root / "good", tmp_path / "part", **options(built.root, **changes), progress=Progress(None))
    assert not (tmp_path / "part").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").touch()
    with pytest.raises(ValueError, match="own holds files that are of no build; give a new folder"):
        build_part(built.root / "good", tmp_path / "own", **options(built.root))


def test_what_is_refused_leaves_an_earlier_build_as_it_was(built: SimpleNamespace) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.part.rglob("*") if path.is_file() and path.suffix}
    with pytest.raises(ValueError, match="give --false-alarms"):
        build_part(
            built.root / "good",
            **options(built.root, false_alarms=0.001),
            output=built.part,
            restart=True,
            progress=Progress(None),
        )
    after = {path: path.stat().st_mtime_ns for path in built.part.rglob("*") if path.is_file() and path.suffix}
    before.pop(built.part / "work/build.log", None), after.pop(built.part / "work/build.log", None)
    assert before == after


def test_two_builds_in_one_folder_are_refused(built: SimpleNamespace) -> None:
    with (
        FileLock(built.part / "work/lock"),
        pytest.raises(ValueError, match="part1 is being built by another process: wait for it, or take another"),
    ):
        build_part(built.root / "good", **options(built.root), output=built.part, progress=Progress(None))


def test_a_folder_that_cannot_be_written_is_named(built: SimpleNamespace) -> None:
    inside = built.root / "good" / "0.txt"
    inside.touch()
    with pytest.raises(ValueError, match=r"--output .* cannot be written \(Not a directory\); give a folder that can"):
        build_part(built.root / "good", **options(built.root), output=inside / "part", progress=Progress(None))
    inside.unlink()


def test_the_program_tells_mistakes_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["build", str(tmp_path), "--output", str(tmp_path / "part")], "holds no image"),
        (["build", str(tmp_path)], "required: --output"),
        (["build", str(tmp_path), "--output", "part", "--minutes", "ten"], "invalid float value: 'ten'"),
        (["status", str(tmp_path)], "holds no build"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    for words in (["build"], ["inspect"], ["compare"], ["status"], []):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert not ended.value.code
        assert f"usage: {' '.join(['anomalib-fractalad', *words])}" in capsys.readouterr().out


def test_the_plan_fits_the_time() -> None:
    assert rungs(1) == ()
    assert rungs(6) == ((6, 1 / 8), (3, 1 / 4), (2, 1 / 2))
    costs = [100.0, 200.0, 50.0, 100.0]
    for seconds in (10_000, 1000, 300, 60, 1):
        plan = make_plan(costs, seconds)
        count = plan.rungs[0][0] if plan.rungs else 1
        kept = sorted(costs[:count], reverse=True)
        choosing = sum(plan.effort * share * sum(kept[:number]) for number, share in plan.rungs)
        assert count == 1 or choosing <= CHOOSING * seconds
        assert plan.effort == 1 / 16 or plan.effort * kept[0] <= TRAINING * seconds
    assert make_plan(costs, 10_000) == Plan(1.0, rungs(4))
    assert make_plan(costs, 1) == Plan(1 / 16, ())
    assert make_plan(costs, 70, [10.0, 20.0]) == Plan(1 / 16, ((2, 1 / 2),))
    assert make_plan(costs, 10_000, [10.0]).rungs == rungs(5)


def test_a_tie_is_a_difference_within_the_spread() -> None:
    best = {str(source): 0.8 + 0.01 * (source % 3) for source in range(12)}
    assert is_tie(best, {source: value - 0.02 * (-1) ** int(source) for source, value in best.items()})
    assert not is_tie(best, {source: value - 0.02 for source, value in best.items()})


class Oracle(torch.nn.Module):
    """A model that knows the masks of trials, or is blind; images come in the order of their names."""

    def __init__(self, trials: Sequence[Trial], *, sees: bool) -> None:
        super().__init__()
        self.pre_processor = SimpleNamespace(transform=Resize((64, 64)))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._sees, self._ordered = sees, iter(sorted(trials, key=lambda trial: trial.file))

    def model(self, images: torch.Tensor) -> InferenceBatch:
        trials = list(islice(self._ordered, len(images)))
        masks = [torch.zeros(1, 64, 64) if trial.mask is None else self._mask(trial.mask) for trial in trials]
        maps = torch.stack(masks) if self._sees else torch.rand(len(images), 1, 64, 64)
        return InferenceBatch(pred_score=maps.amax((1, 2, 3)), anomaly_map=maps)

    @staticmethod
    def _mask(file: str) -> torch.Tensor:
        return torch.as_tensor(read_mask(file, as_tensor=True)).unsqueeze(0).float()


def test_defects_are_the_same_each_time_and_tell_models_apart(tmp_path: Path, built: SimpleNamespace) -> None:
    found = look(built.root / "good")
    trials = make_trials(found.files[:8], tmp_path / "one", kind=found.kind, count=40)
    assert {trial.kind for trial in trials} == {None, *DEFECTS}
    assert len({trial.severity for trial in trials if trial.kind}) == 3
    # No kind belongs to some of the images, which would pass for a difference between images.
    for parity in (0, 1):
        assert len({trial.kind for trial in trials if trial.kind and trial.source % 2 == parity}) >= 8
    again = make_trials(found.files[:8], tmp_path / "two", kind=found.kind, count=40)
    for one, other in zip(trials, again, strict=True):
        assert Path(one.file).read_bytes() == Path(other.file).read_bytes()
    other_seed = make_trials(found.files[:8], tmp_path / "three", kind=found.kind, count=40, seed=1)
    assert Path(other_seed[-1].file).read_bytes() != Path(trials[-1].file).read_bytes()

    (sees,) = evaluate(Oracle(trials, sees=True), trials)
    assert (sees.quality, sees.image_auroc, sees.pixel_ap) == (1, 1, 1)
    blind, also_blind = evaluate(Oracle(trials, sees=False), trials, scores=["mean", "max"], left_out=["crack"])
    assert 0.2 < blind.image_auroc < 0.8
    assert blind.pixel_ap == also_blind.pixel_ap < 0.4
    assert "crack" in blind.by_kind
    counted = [pair for kind, pair in blind.by_kind.items() if kind != "crack"]
    assert blind.image_auroc == pytest.approx(np.mean([area for area, _ in counted]), abs=0.05)
    assert is_tie(blind.by_source, also_blind.by_source)
    assert not is_tie(sees.by_source, blind.by_source)


def test_defects_lie_on_the_object_and_in_the_region(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(4):
        image = random.normal(40, 2, (96, 96))
        image[8:88, 8:88] = 150 + 30 * np.sin(np.arange(80) / 2) + random.normal(0, 4, (80, 80))
        save(image, tmp_path / f"{index}.png")
    files = sorted(tmp_path.glob("*.png"))
    region = torch.zeros(96, 96, dtype=torch.bool)
    region[:, 48:] = True
    trials = make_trials(files, tmp_path / "trials", kind="object", count=24, region=lambda _size: region)
    masks = [read_mask(trial.mask) > 0 for trial in trials if trial.mask is not None]
    assert len(masks) > 8
    assert all(mask[8:88, 48:88].sum() >= 0.45 * mask.sum() for mask in masks)


@pytest.mark.usefixtures("_no_export")
def test_region_and_f1(built: SimpleNamespace, tmp_path: Path) -> None:
    """A region of interest is in the model, and bad images move the threshold where that is asked for."""
    region = np.zeros((64, 64))
    region[:, 16:] = 255
    save(region, tmp_path / "roi.png")
    arguments = "{memory_size: 40, reservoir_size: 400}"
    (tmp_path / "one.yaml").write_text(
        f"- {{name: memory, size: 64, model: {{class_path: FractalMemory, init_args: {arguments}}}}}"
    )
    given = {"roi": tmp_path / "roi.png", "candidates": tmp_path / "one.yaml", "threshold": "f1"}
    report = build_part(built.root / "good", tmp_path / "part", **options(built.root, **given), progress=Progress(None))
    content = report_content(report)
    assert content["choice"]["why"] == "the only candidate"
    model = FractalMemory.load_from_checkpoint(tmp_path / "part" / "work" / "model.ckpt", visualizer=False).eval()
    images = torch.rand(2, 3, 64, 64)
    images[1, ..., 16:] = images[0, ..., 16:]
    found = model.model(images)
    assert torch.equal(found.anomaly_map[0], found.anomaly_map[1])
    assert found.anomaly_map[..., :16].max() == 0 < found.anomaly_map[..., 16:].min()
    assert model.hparams["roi"].startswith("data:")
    assert type(model.post_processor) is OrderPreservingPostProcessor
    assert any(row["score"] > 0.5 for row in content["images"] if row["group"] == "bad")
    save(np.full((64, 32), 255), tmp_path / "narrow.png")
    given["roi"] = tmp_path / "narrow.png"
    with pytest.raises(ValueError, match="must have the same proportions"):
        build_part(built.root / "good", tmp_path / "other", **options(built.root, **given), progress=Progress(None))
