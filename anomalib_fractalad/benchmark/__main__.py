# SPDX-License-Identifier: Apache-2.0
"""Side-by-side comparison of anomaly detection models.

Run as ``python -m anomalib_fractalad.benchmark --config configs/benchmark.yaml``.
"""

import sys
import warnings
from pathlib import Path

from jsonargparse import auto_cli
from tqdm import tqdm

from anomalib_fractalad.benchmark.config import RUNTIMES, DataEntry, ModelEntry, Settings, make_jobs
from anomalib_fractalad.benchmark.job import is_missing, record_of, run_in_process


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

    Each model on each data set with each seed is a job in a process of its own. What a job measures is kept in
    OUTPUT/jobs, the trained model beside it (model.ckpt, for anomalib's export and predict; it may be deleted), and a
    second call does only what is missing there: runtimes that were added are measured without training again, and
    jobs whose images have changed since are run anew. Written from all of them: results.csv (a row for each job),
    report.md, its plots, and a sheet of heat maps.

    Args:
        models: Models to compare, each with class_path (FractalAD, Patchcore, ...), init_args, epochs or steps (unless
            the model sets its training length itself), and if wanted name, train_batch_size and precision.
        data: Data to compare them on, each with class_path (SurfaceDefects, MVTecAD, Folder, ...), init_args and if
            wanted name.
        seeds: Seeds of the random numbers; the report gives mean and standard deviation over them.
        output: Folder of the results.
        image_size: Height and width that every model resizes to. Left out, each model has its own.
        accelerator: Where models are trained and where the runtime torch runs: auto, cpu, gpu. OpenVINO runs on
            the CPU.
        threads: CPU threads of training and inference. Left out, torch and OpenVINO choose.
        runtimes: Where inference is timed: torch, openvino_fp32, openvino_fp16, openvino_int8.
        repetitions: Timed predictions of one image.
        sheet_images: Images on the sheet of heat maps.
        time_limit: Seconds that a job may take. Left out, any time.
        retry: Do again what failed or ran out of time.

    Returns:
        The report.
    """
    if time_limit is not None and time_limit <= 0:
        msg = f"time_limit is {time_limit}; it must be above 0 seconds"
        raise ValueError(msg)
    settings = Settings(image_size, accelerator, threads, tuple(runtimes), repetitions, sheet_images)
    jobs = make_jobs(models, data, seeds, settings)
    missing = [job for job in jobs if is_missing(job, record_of(job, output), retry)]
    print(f"{len(jobs)} jobs, {len(jobs) - len(missing)} of them in {output} already")
    with tqdm(missing, unit="job", disable=not missing) as bar:
        for job in bar:
            bar.set_description(str(job))
            run_in_process(job, record_of(job, output), time_limit, bar.set_postfix_str)
    from anomalib_fractalad.benchmark.report import write_report  # noqa: PLC0415

    report = write_report(jobs, output)
    for job in jobs:
        content = record_of(job, output).content
        if content["status"] != "done":
            print(f"{job}: {content['status']}: {content['reason']}")
        for runtime, values in content.get("runtimes", {}).items():
            if "reason" in values:
                print(f"{job}: {runtime}: {values['reason']}")
    print(f"report: {report}")
    return report


def main() -> None:
    """Run the command; a mistake in the configuration is told in one line."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(anomalib|timm)\.")  # not the user's doing
    try:
        auto_cli(benchmark, as_positional=False, prog="python -m anomalib_fractalad.benchmark")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
