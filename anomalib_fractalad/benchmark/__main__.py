# SPDX-License-Identifier: Apache-2.0
"""Side-by-side comparison of anomaly detection models.

Run as ``anomalib-fractalad compare --config configs/benchmark.yaml``.
"""

import sys
import warnings
from collections import deque
from importlib.util import find_spec
from pathlib import Path

from filelock import Timeout
from jsonargparse import auto_cli

from anomalib_fractalad.benchmark.config import RUNTIMES, DataEntry, Job, ModelEntry, Settings, make_jobs
from anomalib_fractalad.benchmark.record import is_missing, record_of
from anomalib_fractalad.benchmark.runner import run_in_process

EXTRA = ("matplotlib", "pandas", "tqdm")


def benchmark(
    models: list[ModelEntry],
    data: list[DataEntry],
    seeds: list[int] = [0],  # noqa: B006
    output: Path = Path("results/comparison"),
    image_size: tuple[int, int] | None = None,
    accelerator: str = "auto",
    threads: int | None = None,
    runtimes: list[str] = list(RUNTIMES),  # noqa: B006
    repetitions: int = 50,
    sheet_images: int = 6,
    time_limit: float | None = None,
    retry: bool = False,
) -> Path:
    """Train, test, export and time anomaly detection models side by side.

    Each model on each data set with each seed is a job in a process of its own, kept in OUTPUT/jobs. A second call does
    what is missing: it goes on after the last epoch of a training that was stopped, and measures runtimes that were
    added without training again. Jobs whose images or code have changed are run anew. Calls on one output share its
    jobs: each does what no other is doing, and waits for the rest. Written from all of them: results.csv, report.md,
    its plots, and a sheet of heat maps.

    Args:
        models: Models to compare, each with class_path (FractalAD, Patchcore, ...), init_args, epochs or steps (unless
            the model sets its training length itself), and if wanted name, train_batch_size and precision.
        data: Data to compare them on, each with class_path (SurfaceDefects, MVTecAD, Folder, ...), init_args and if
            wanted name.
        seeds: Seeds of the random numbers; the report gives mean and standard deviation over them.
        output: Folder of the results; trained models lie below its folder jobs and may be deleted.
        image_size: Height and width that every model resizes to. Left out, each model has its own.
        accelerator: Where models are trained and where torch is timed: auto, cpu, gpu. OpenVINO runs on the CPU.
        threads: CPU threads of training and inference. Left out, torch and OpenVINO choose.
        runtimes: Where inference is timed: torch, openvino_fp32, openvino_fp16, openvino_int8.
        repetitions: Timed predictions of one image.
        sheet_images: Images on the sheet of heat maps.
        time_limit: Seconds that a job may take in one call. Left out, any time.
        retry: Do again what failed, and what ran out of time with nothing to go on from.

    Returns:
        The report.
    """
    _check(time_limit)
    settings = Settings(image_size, accelerator, threads, tuple(runtimes), repetitions, sheet_images)
    jobs = make_jobs(models, data, seeds, settings)
    _run(jobs, output, time_limit, retry)
    from anomalib_fractalad.benchmark.report import write_report  # noqa: PLC0415  an extra

    report = write_report(jobs, output)
    _tell_failures(jobs, output)
    print(f"report: {report}")
    return report


def _check(time_limit: float | None) -> None:
    if missing := [package for package in EXTRA if find_spec(package) is None]:
        msg = f"the comparison needs {', '.join(missing)}: pip install 'anomalib-fractalad[benchmark]'"
        raise ModuleNotFoundError(msg)
    if time_limit is not None and time_limit <= 0:
        msg = f"time_limit is {time_limit}; it must be above 0 seconds"
        raise ValueError(msg)


def _run(jobs: list[Job], output: Path, time_limit: float | None, retry: bool) -> None:
    from tqdm import tqdm  # noqa: PLC0415

    missing = deque(job for job in jobs if is_missing(job, record_of(job, output), retry))
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them in {output} already")
    elsewhere = set()
    with tqdm(total=len(missing), unit="job", disable=not missing) as bar:
        while missing:
            job = missing.popleft()
            bar.set_description(str(job))
            is_last = job.key in elsewhere  # what nobody does comes first
            if is_last:
                bar.set_postfix_str("waiting for another call that does this job")
            record = record_of(job, output)
            try:
                held = record.lock.acquire(blocking=is_last)
            except Timeout:
                elsewhere.add(job.key)
                missing.append(job)
                continue
            with held:
                record.read()  # another call may have done it by now
                if is_missing(job, record, retry and not is_last):
                    run_in_process(job, record, time_limit, bar.set_postfix_str, tqdm.write)
            bar.update()


def _tell_failures(jobs: list[Job], output: Path) -> None:
    for job in jobs:
        record = record_of(job, output)
        content = record.content
        if content["status"] != "done":
            goes_on = is_missing(job, record)
            print(f"{job}: {content['status']}: {content['reason']}{'; a second call goes on' if goes_on else ''}")
        for runtime, values in content.get("runtimes", {}).items():
            if "reason" in values:
                print(f"{job}: {runtime}: {values['reason']}")


def main(arguments: list[str] | None = None, prog: str = "python -m anomalib_fractalad.benchmark") -> None:
    """Run the command; a mistake in the configuration is told in one line.

    Args:
        arguments: Those of the command line; left out, the process's.
        prog: The command's name.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not the user's doing
        try:
            auto_cli(benchmark, args=arguments, as_positional=False, prog=prog)
        except (ValueError, ModuleNotFoundError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
