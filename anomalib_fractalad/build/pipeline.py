# SPDX-License-Identifier: Apache-2.0
"""From a folder of good images to a part's folder: look, choose, train, export, report."""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import yaml
from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from filelock import FileLock, Timeout
from lightning import seed_everything

from anomalib_fractalad.models.components.lightning_module import OneClassModule

from .candidates import Candidate, candidates
from .choose import Setting, choose
from .look import Look, look
from .part import export_part
from .request import WORK, Request
from .split import Split, data_module, split, table
from .state import Progress, State, duration, quiet, told
from .training import train, trainer_length
from .trials import Trial, make_trials

CHECKPOINT = "model.ckpt"
_LOCK, _LOG = "lock", "build.log"
_CHECKED_BAD = 200  # bad images that exported networks are checked with, at most
_TRIALS = 120  # defects to choose by
_SHOWN_TRIALS, _SHOWN_SOURCES = 60, 20  # defects in the report, and images that they are made in
_LARGE = 1_000_000  # pixels of an image that is worth processes of their own to read


def build_part(
    good: str | Path,
    output: str | Path,
    *,
    restart: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Path:
    """Build a model of a part from a folder of good images.

    A second call with the same arguments goes on where the first one stopped.

    Args:
        good: Folder of good images, with sub-folders.
        output: Folder of the part: the models, part.json, inspect.py, anomalib.yaml and report.html are written there.
        restart: Build anew what is in the folder already.
        progress: Tells how far it is; left out, on standard output.
        **options: As the attributes of :class:`Request`.

    Returns:
        The report.

    Raises:
        ValueError: If something is wrong with the images or the options; the message says how to mend it.
        RuntimeError: If no candidate can be trained.
        KeyboardInterrupt: If it is stopped; the same call goes on.

    Example:
        >>> from anomalib_fractalad.build import build_part
        >>> build_part("good", "part1", minutes=10)  # doctest: +SKIP
    """
    paths = {name: None if options[name] is None else Path(options[name]) for name in _PATHS & options.keys()}
    request = Request(Path(good), Path(output), **{**options, **paths})
    request.check()
    progress = progress or Progress()
    work, asked = request.output / WORK, request.plain()
    with _alone_in(work), quiet(work / _LOG), _interruptible():
        state = State(work / "state.json")
        if not restart and state.is_of(asked):
            progress.line(f"going on with {request.output}")
        build = _Build(request, state, progress)
        found = build.look()  # what is refused here leaves all as it was
        if restart:
            _clear(work)
            state.content = {}
        state.save(request=asked)
        return build.run(*found)


@contextlib.contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Keep other builds out of a folder, which is removed if nothing begins in it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(work / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"{work.parent} is being built by another process: wait for it, or take another --output"
        raise ValueError(msg) from None
    except OSError as error:
        msg = f"--output {work.parent} cannot be written ({error.strerror}); give a folder that can"
        raise ValueError(msg) from error
    try:
        yield
    finally:
        lock.release()
        if not (work / "state.json").exists():
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds other files
                work.parent.rmdir()


def _clear(work: Path) -> None:
    """Remove what an earlier build did, but for what is in use."""
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in {_LOCK, _LOG}:
            item.unlink()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning makes it the end of the process, and is deaf to it from then on."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread and handler is not None:
            signal.signal(signal.SIGINT, handler)


_PATHS = {"bad", "roi", "candidates", "weights"}


class _Build:
    """A build in the making."""

    def __init__(self, request: Request, state: State, progress: Progress) -> None:
        self._request, self._state, self._progress = request, state, progress
        self._work = request.output / WORK

    def look(self) -> tuple[Look, Split, Any, list[Candidate], list[Path]]:
        """The first stage: look at the images, and refuse what nothing can be built of."""
        request, progress = self._request, self._progress
        progress.stage(f"looking at {request.good}")
        found = look(request.good, request.group, [request.output])
        dealt = split(found, request.false_alarms, request.seed)
        for line in [*found.summary(), *(f"note: {warning}" for warning in dealt.warnings)]:
            progress.line(f"      {line}")
        region = self._region(found)
        pool = candidates(found, self._common(), request.candidates)
        bad = request.files(request.bad) if request.bad is not None else []
        return found, dealt, region, pool, bad

    def run(self, found: Look, dealt: Split, region: Any, pool: Sequence[Candidate], bad: Sequence[Path]) -> Path:
        """All other stages."""
        progress = self._progress
        counts = (
            f"{len(dealt.train)} to train on, {len(dealt.held)} held out, {len(dealt.calibration)} to calibrate with"
        )
        progress.stage(f"choosing among {len(pool)} candidates ({counts})")
        choice = choose(pool, self._setting(found, dealt, region), self._state, progress)
        chosen = next(candidate for candidate in pool if candidate.name == choice["chosen"])
        progress.line(f"      chosen: {chosen.name}, {choice['why']}")
        progress.stage(f"training {chosen.name} on {len(dealt.train) + len(dealt.held)} images")
        model, data = self._trained(chosen, choice, found, dealt, bad)
        progress.stage("exporting")
        info = self._exported(model, data, dealt, bad, chosen)
        progress.stage("writing the report")
        report = self._report(model, found, dealt, bad, choice, info, region)
        self._state.save(done=True, seconds=self._state.content.get("seconds", 0.0) + progress.elapsed)
        progress.line(f"done in {duration(progress.elapsed)}: {report}")
        return report

    def _region(self, found: Look) -> Any:
        """Gives the region of interest at a size, or none."""
        if self._request.roi is None:
            return None
        from torchvision.transforms.v2.functional import resize  # noqa: PLC0415

        from anomalib_fractalad.models.components.region import check_roi, read_roi  # noqa: PLC0415

        check_roi(self._request.roi, list(found.sizes))
        mask = read_roi(self._request.roi)
        return lambda size: resize(mask.unsqueeze(0).float(), list(size))[0] > 0.5

    def _common(self) -> dict[str, Any]:
        request = self._request
        given = {"weights": request.weights, "roi": request.roi}
        return {
            "backbone": request.backbone,
            "pre_trained": request.pre_trained,
            **{name: str(file.resolve()) for name, file in given.items() if file is not None},
        }

    def _workers(self, found: Look) -> int:
        return 2 if found.size[0] * found.size[1] > _LARGE else 0

    def _setting(self, found: Look, dealt: Split, region: Any) -> Setting:
        request = self._request
        trials: Sequence[Trial] = ()
        if "chosen" not in self._state.content.get("choice", {}):
            trials = make_trials(
                dealt.held,
                self._work / "held",
                kind=found.kind,
                count=_TRIALS,
                seed=request.seed,
                region=region,
                show=self._progress.step,
            )
        return Setting(
            dealt.train,
            trials,
            self._work / "choice",
            60 * request.minutes,
            request.effort,
            request.seed,
            request.accelerator,
            self._workers(found),
        )

    def _post_processor(self, dealt: Split) -> dict[str, Any]:
        if self._request.threshold == "f1":
            return {"class_path": "anomalib_fractalad.post_processing.OrderPreservingPostProcessor"}
        name = "anomalib_fractalad.post_processing.FalseAlarmThreshold"
        return {"class_path": name, "init_args": {"false_alarms": dealt.false_alarms}}

    def _trained(
        self, chosen: Candidate, choice: dict[str, Any], found: Look, dealt: Split, bad: Sequence[Path]
    ) -> tuple[AnomalibModule, AnomalibDataModule]:
        """The chosen model, trained and calibrated, and its data."""
        request = self._request
        files = sorted([*dealt.train, *dealt.held])
        lists: dict[str, Any] = {
            "batch_size": chosen.batch_size,
            "workers": self._workers(found),
            "name": request.output.name,
        }
        effort = 1.0 if chosen.steps is None else choice["plan"]["effort"]
        length = trainer_length(chosen, len(files), effort)
        post_processor = self._post_processor(dealt)
        self._write_configuration(chosen, choice, length, table(files, dealt.calibration, bad, **lists), post_processor)
        seed_everything(request.seed, workers=True, verbose=False)
        data = data_module(files, dealt.calibration, bad, **lists)
        model = chosen.build(choice["score"], post_processor=post_processor)
        checkpoint = self._work / CHECKPOINT
        if checkpoint.exists():
            data.setup()
            trained = type(model).load_from_checkpoint(checkpoint, visualizer=False, pre_trained=False)
            return trained, data
        begin = time.monotonic()
        engine = train(
            model,
            data,
            length,
            self._work / "training",
            accelerator=request.accelerator,
            validate=True,
            show=self._progress.step,
        )
        self._progress.step("saving")
        engine.trainer.save_checkpoint(checkpoint.with_suffix(".new"), weights_only=False)
        checkpoint.with_suffix(".new").replace(checkpoint)
        self._state.save(training={"seconds": time.monotonic() - begin, "effort": effort, **length})
        return model, data

    def _write_configuration(
        self,
        chosen: Candidate,
        choice: dict[str, Any],
        length: dict[str, Any],
        data: dict[str, Any],
        post_processor: dict[str, Any],
    ) -> None:
        """Write the choice as a configuration of anomalib's program."""
        request = self._request
        content = {
            "model": chosen.configuration(choice["score"], post_processor=post_processor),
            "data": {"class_path": "Tabular", "init_args": data},
            "trainer": {
                "accelerator": request.accelerator,
                "devices": 1,
                **length,
                "check_val_every_n_epoch": length["max_epochs"],
            },
            "seed_everything": request.seed,
        }
        heading = (
            f"# {chosen.name}, chosen by anomalib-fractalad {version('anomalib-fractalad')}. Trains the same model:\n"
            "# anomalib train --config anomalib.yaml\n"
        )
        text = heading + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        (request.output / "anomalib.yaml").write_text(text, encoding="utf-8")

    def _exported(
        self, model: AnomalibModule, data: AnomalibDataModule, dealt: Split, bad: Sequence[Path], chosen: Candidate
    ) -> dict[str, Any]:
        if "export" in self._state.content:
            return self._state.content["export"]  # type: ignore[no-any-return]
        extra = {"candidate": chosen.name, "seed": self._request.seed, "report": "report.html"}
        images = [*dealt.calibration, *bad[:: len(bad) // _CHECKED_BAD + 1]]
        with told(self._progress, "anomalib_fractalad.build.part"):
            info = export_part(
                cast("OneClassModule", model), data, self._request.output, images, int8=self._request.int8, extra=extra
            )
        self._state.save(export=info)
        return info

    def _report(
        self,
        model: AnomalibModule,
        found: Look,
        dealt: Split,
        bad: Sequence[Path],
        choice: dict[str, Any],
        info: dict[str, Any],
        region: Any,
    ) -> Path:
        from .report import write_report  # noqa: PLC0415
        from .scoring import score_images  # noqa: PLC0415

        trials = make_trials(
            dealt.calibration[:: len(dealt.calibration) // _SHOWN_SOURCES + 1],
            self._work / "calibration",
            kind=found.kind,
            count=_SHOWN_TRIALS,
            seed=self._request.seed + 1,
            region=region,
            show=self._progress.step,
        )
        scored = score_images(
            model,
            found.folder,
            dealt.calibration,
            bad,
            trials,
            accelerator=self._request.accelerator,
            show=self._progress.step,
        )
        state = self._state.content
        content = {
            "name": self._request.output.name,
            "request": state["request"],
            "look": found.as_json(),
            "split": {
                "train": len(dealt.train) + len(dealt.held),
                "held": len(dealt.held),
                "calibration": len(dealt.calibration),
                "false_alarms": dealt.false_alarms,
            },
            "choice": choice,
            "training": state.get("training", {}),
            "part": info,
            "warnings": [*found.warnings, *dealt.warnings],
        }
        return write_report(self._request.output / "report.html", content, scored)
