# SPDX-License-Identifier: Apache-2.0
"""One job, from its record to its figures; run as ``python -m anomalib_fractalad.benchmark.worker RECORD PARENT``."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from anomalib_fractalad.benchmark.record import Record, conditions, describe, missing_runtimes, state_of

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule
    from anomalib.models.components import AnomalibModule

_POLL_SECONDS = 0.5


def measure(record: Record) -> None:
    """Train, test, export and time a model, as far as its record says that it was not done yet.

    Args:
        record: The job's record, with its description; it is saved with each stage's name and results as they come.
    """
    from anomalib_fractalad.benchmark.fit import build, environment  # noqa: PLC0415  after what can be refused
    from anomalib_fractalad.benchmark.quality import ScoreCollector, evaluate, prepare_test, sheet_paths  # noqa: PLC0415
    from anomalib_fractalad.benchmark.surroundings import cpu_threads  # noqa: PLC0415

    spec, measuring = record.content["spec"], record.content["measuring"]
    record.enter("preparing", environment=environment())
    with TemporaryDirectory() as temporary, cpu_threads(spec["threads"]):
        root = Path(temporary)
        model, datamodule = build(spec, root)
        if record.is_trained:
            record.enter("loading the trained model")
        else:
            model, datamodule = _train(record, model, datamodule, root)
            record.enter("testing")
        is_complete = record.content.get("has_thresholds", False)
        prepare_test(model, datamodule, spec["accelerator"], root, record.checkpoint, is_complete)
        record.save(has_thresholds=True)
        collector = ScoreCollector(sheet_paths(datamodule, measuring["sheet_images"]), record.folder)
        quality, defects, device = evaluate(model, datamodule, collector, spec["accelerator"], root)
        record.save(
            quality=quality,
            defects=defects,
            scores=collector.scores,
            sheet=collector.sheet,
            sheet_images=measuring["sheet_images"],
        )
        for runtime in missing_runtimes(record.content, measuring):
            record.enter(runtime)
            _time(record, model, datamodule, runtime, device, root)


def _train(
    record: Record, model: "AnomalibModule", datamodule: "AnomalibDataModule", root: Path
) -> tuple["AnomalibModule", "AnomalibDataModule"]:
    """Train a model, from the last epoch of an earlier call if there is one."""
    from anomalib_fractalad.benchmark.fit import CannotResumeError, FitMeter, build, fit, inputs  # noqa: PLC0415

    spec, checkpoint = record.content["spec"], record.training_checkpoint
    record.enter("training", inputs=state_of(inputs(spec, datamodule)))

    def show(progress: dict[str, Any]) -> None:
        if meter.resumed:
            record.content["resumed"] = meter.resumed
        record.save(progress=progress)

    meter = FitMeter(show)
    try:
        cost = fit(model, datamodule, spec, root, checkpoint, meter)
    except CannotResumeError as error:
        traceback.print_exc()
        checkpoint.unlink(missing_ok=True)
        record.save(resumed={"reason": str(error)})
        model, datamodule = build(spec, root)
        meter = FitMeter(show)
        cost = fit(model, datamodule, spec, root, checkpoint, meter)
    record.folder.mkdir(parents=True, exist_ok=True)
    model.trainer.save_checkpoint(record.checkpoint, weights_only=True)
    record.save(cost=cost)
    checkpoint.unlink(missing_ok=True)
    return model, datamodule


def _time(
    record: Record,
    model: "AnomalibModule",
    datamodule: "AnomalibDataModule",
    runtime: str,
    device: str,
    root: Path,
) -> None:
    from anomalib_fractalad.benchmark.speed import speed  # noqa: PLC0415

    content = record.content
    threads, repetitions = content["spec"]["threads"], content["measuring"]["repetitions"]
    figures = conditions(runtime, content["measuring"])
    try:
        figures |= speed(model, datamodule, runtime, device, threads, repetitions, root, content["scores"])
    except Exception as error:  # the other runtimes go on
        traceback.print_exc()
        figures["reason"] = describe(error)
    record.save(runtimes={**content.get("runtimes", {}), runtime: figures})


def refuse_large_downloads(model: dict[str, Any]) -> None:
    """Refuse EfficientAd without its ImageNette images, which anomalib would download (1.6 GB).

    Args:
        model: ``class_path`` and ``init_args``.

    Raises:
        FileNotFoundError: If the folder is missing.
    """
    folder = model["init_args"].get("imagenet_dir")
    if folder is not None and not Path(folder).is_dir():
        msg = (
            f"{model['class_path'].rpartition('.')[2]} needs the ImageNette images (imagenette2), and there is no "
            f"folder {folder}; give init_args.imagenet_dir a folder of them"
        )
        raise FileNotFoundError(msg)


def main(file: Path) -> int:
    """Run the job of a record.

    Args:
        file: The record's file.

    Returns:
        The exit status.
    """
    record = Record(file)
    try:
        refuse_large_downloads(record.content["spec"]["model"])
        measure(record)
    except Exception as error:
        traceback.print_exc()
        record.save(status="failed", reason=describe(error))
        return 1
    record.enter("done", status="done")
    return 0


def end_with(parent: int) -> None:
    """End this process and its children soon after the parent, however that ends.

    Args:
        parent: The parent's process ID.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    if sys.platform != "win32":  # which does not tell of a parent that ended
        end_with(int(sys.argv[2]))
    sys.exit(main(Path(sys.argv[1])))
