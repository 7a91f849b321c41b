# SPDX-License-Identifier: Apache-2.0
"""The comparison's table and report."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from anomalib_fractalad.benchmark.config import Job
from anomalib_fractalad.benchmark.plots import (
    RUNTIME_NAMES,
    defect_columns,
    draw_sheet,
    plot_defects,
    plot_fit_time,
    plot_latency,
)
from anomalib_fractalad.benchmark.record import record_of

QUALITY = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AP",
    "image_F1Max": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPR": "pixel AP",
    "pixel_F1Max": "pixel F1-max",
    "pixel_AUPRO": "AUPRO",
}
COST = {
    "fit_seconds": ("fit, s", 1),
    "train_images_per_second": ("images/s", 1),
    "peak_memory_mb": ("peak memory, MiB", 0),
    "peak_cuda_memory_mb": ("peak CUDA memory, MiB", 0),
    "trainable_parameters": ("trainable parameters", 0),
    "total_parameters": ("parameters", 0),
}
SPEED = {
    "file_mb": ("files, MiB", 1),
    "latency_ms": ("latency, ms", 1),
    "latency_90_ms": ("90 %, ms", 1),
    "images_per_second": ("images/s, 8 at once", 1),
    "image_AUROC": ("image AUROC", 3),
}
MISSING = "-"

HOW_MEASURED = """\
Figures are means over the seeds, with the standard deviation where there are several. Quality is that of the scores and
maps as the networks give them, before anomalib's normalization, which clamps. Fit time is training alone, without
validation; where a training was stopped and gone on with, up to the last epoch that was kept. Peak memory is the
resident set of the process up to the end of training, without the data loaders' workers. Trainable are the parameters
that an optimizer moves.

Every model is exported in the same way: for one image, of the height and width that the model resizes to. Latency is
from such an image in memory to score and map, pre- and post-processing included: the median and the 90 % quantile of
{repetitions} predictions. Eight at once are a batch in torch, and eight requests in OpenVINO. FP32 and INT8 are
compiled with the hint `INFERENCE_PRECISION_HINT: f32`, so that they compute in float32 where the processor has bfloat16
too; FP16 is compiled without a hint, and the table says what OpenVINO chose. INT8 is NNCF's post-training quantization
of the convolutions between features, the same for every model, calibrated with the same training images and fractal
anomalies in them. The image AUROC of each OpenVINO model is over all test images."""


def write_report(jobs: Sequence[Job], output: Path) -> Path:
    """Write ``results.csv``, ``report.md`` and its figures.

    Args:
        jobs: The jobs of the comparison; each must have been run.
        output: Folder of the results.

    Returns:
        The report.
    """
    results = pd.DataFrame([_row(job, record_of(job, output).content) for job in jobs])
    results.to_csv(output / "results.csv", index=False)
    sections = [
        "# Comparison of anomaly detection models",
        _what_was_run(jobs, output),
        *(_data_section(name, results[results.data == name], jobs, output) for name in dict.fromkeys(results.data)),
        _failures(results),
    ]
    report = output / "report.md"
    report.write_text("\n\n".join(section for section in sections if section) + "\n")
    return report


def _row(job: Job, content: dict[str, Any]) -> dict[str, Any]:
    row = {"model": job.model, "data": job.data, "seed": job.seed}
    row |= {"status": content["status"], "reason": content.get("reason")}
    row |= content.get("quality", {}) | content.get("cost", {})
    row |= {f"image_AUROC/{defect}": value for defect, value in content.get("defects", {}).items()}
    for runtime, values in content.get("runtimes", {}).items():
        row |= {f"{runtime}/{name}": value for name, value in values.items()}
    return {**row, "key": job.key}


def _what_was_run(jobs: Sequence[Job], output: Path) -> str:
    rows = []
    for job in {job.model: job for job in jobs}.values():
        arguments = ", ".join(f"{name}: {json.dumps(value)}" for name, value in job.arguments.items())
        rows.append([job.model, _budget(job.spec), arguments, "; ".join(job.notes)])
    spec = jobs[0].spec
    machines = {json.dumps(record_of(job, output).content.get("environment")): None for job in jobs}
    versions = ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
    facts = [
        f"Seeds: {', '.join(map(str, dict.fromkeys(job.seed for job in jobs)))}",
        f"image size: {_size(spec['image_size'])}",
        f"CPU threads: {spec['threads'] or 'the choice of each runtime'}",
        f"versions: {versions}",
        f"code of anomalib-fractalad: {spec['code']}",
    ]
    lines = [
        "; ".join(facts) + ".",
        *(_machine(json.loads(machine)) for machine in machines if machine != "null"),
        HOW_MEASURED.format(repetitions=jobs[0].measuring["repetitions"]),
    ]
    return "## What was run\n\n" + _table(["model", "budget", "arguments", "notes"], rows) + "\n\n" + "\n\n".join(lines)


def _budget(spec: dict[str, Any]) -> str:
    budget = next((f"{unit}: {spec[unit]}" for unit in ("epochs", "steps") if spec[unit]), "its own")
    given = [f"{name}: {spec[name]}" for name in ("train_batch_size", "precision") if spec[name] is not None]
    return ", ".join([budget, *given])


def _size(size: Sequence[int] | None) -> str:
    return "each model's own" if size is None else " x ".join(map(str, size))


def _machine(environment: dict[str, Any]) -> str:
    cuda = f", {environment['cuda']}" if environment["cuda"] else ""
    return f"Machine: {environment['cpu']}, {environment['cores']} cores{cuda}, {environment['platform']}."


def _data_section(name: str, results: pd.DataFrame, jobs: Sequence[Job], output: Path) -> str:
    slug = "".join(letter if letter.isalnum() else "_" for letter in name)
    parts = [
        f"## {name}",
        "### Quality\n\n" + _metric_table(results, {metric: (title, 3) for metric, title in QUALITY.items()}),
        "### Image AUROC by type of defect\n\n" + _metric_table(results, _defects(results)),
        "### Cost\n\n" + _metric_table(results, COST),
        "### Speed\n\n" + _speed_table(results),
    ]
    figures: dict[str, tuple[str, Callable[[pd.DataFrame], Figure | None]]] = {
        "latency": ("Quality against latency", plot_latency),
        "fit_time": ("Quality against fit time", plot_fit_time),
        "defects": ("Image AUROC by type of defect", plot_defects),
        "heat_maps": ("Heat maps", lambda _: draw_sheet([job for job in jobs if job.data == name], output)),
    }
    for kind, (title, draw) in figures.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(output / f"{kind}_{slug}.png", dpi=120, bbox_inches="tight")
            parts.append(f"### {title}\n\n![{title}]({kind}_{slug}.png)")
    return "\n\n".join(parts)


def _defects(results: pd.DataFrame) -> dict[str, tuple[str, int]]:
    return {name: (name.partition("/")[2], 3) for name in defect_columns(results)}


def _metric_table(results: pd.DataFrame, columns: dict[str, tuple[str, int]]) -> str:
    present = {name: column for name, column in columns.items() if name in results and results[name].notna().any()}
    rows = [
        [model, str(_runs(group)), *(_cell(group[name], digits) for name, (_, digits) in present.items())]
        for model, group in results.groupby("model", sort=False)
    ]
    return _table(["model", "runs", *(title for title, _ in present.values())], rows)


def _runs(group: pd.DataFrame) -> int:
    """Number of jobs that came as far as to be tested, and so into the means."""
    return int(group["image_AUROC"].notna().sum()) if "image_AUROC" in group else 0


def _speed_table(results: pd.DataFrame) -> str:
    rows = []
    for model, group in results.groupby("model", sort=False):
        for runtime, title in RUNTIME_NAMES.items():
            values = [_cell(group.get(f"{runtime}/{name}"), digits) for name, (_, digits) in SPEED.items()]
            where = _first(group, f"{runtime}/precision") or _first(group, f"{runtime}/device") or MISSING
            reason = _first(group, f"{runtime}/reason")
            if any(value != MISSING for value in values) or reason:
                rows.append([str(model), title, *values, where, reason or ""])
    header = ["model", "runtime", *(title for title, _ in SPEED.values()), "device or precision", "failure"]
    return _table(header, rows)


def _first(group: pd.DataFrame, name: str) -> str | None:
    values = group[name].dropna() if name in group else []
    return str(next(iter(values))) if len(values) else None


def _cell(values: "pd.Series[float] | None", digits: int) -> str:
    if values is None or values.isna().all():
        return MISSING
    known = values.dropna()
    mean = f"{known.mean():,.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {known.std():,.{digits}f}"


def _failures(results: pd.DataFrame) -> str:
    failed = results[results.status != "done"]
    if failed.empty:
        return ""
    columns = ["model", "data", "seed", "status", "reason"]
    rows = [[str(row[name]) for name in columns] for _, row in failed.iterrows()]
    return "## Jobs that did not end\n\n" + _table(columns, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
