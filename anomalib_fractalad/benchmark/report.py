# SPDX-License-Identifier: Apache-2.0
"""The comparison's table, report, plots and sheet of heat maps."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from anomalib_fractalad.benchmark.config import RUNTIMES, Job
from anomalib_fractalad.benchmark.job import record_of

QUALITY = {
    "image_AUROC": "image AUROC",
    "image_AUPR": "image AP",
    "image_F1Max": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPR": "pixel AP",
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
    "images_per_second": ("images/s at batch 8", 1),
    "image_AUROC": ("image AUROC", 3),
}
RUNTIME_NAMES = dict(zip(RUNTIMES, ("torch", "OpenVINO FP32", "OpenVINO FP16", "OpenVINO INT8"), strict=True))
MARKERS = dict(zip(RUNTIMES, "osD^", strict=True))
MISSING = "-"

HOW_MEASURED = """\
Figures are means over the seeds, with the standard deviation where there are several. Fit time is training alone,
without validation. Peak memory is the resident set of the process up to the end of training, without the data loaders'
workers. Trainable are the parameters that an optimiser moves.

Latency is from an image in memory, at its own size, to score and map, pre- and post-processing included: the median
and the 90 % quantile of {repetitions} predictions. OpenVINO FP32 is compiled with the hint
`INFERENCE_PRECISION_HINT: f32`, so that it computes in float32 where the processor has bfloat16 too; FP16 and INT8 are
compiled without a hint, and the table says what OpenVINO chose. INT8 is NNCF's post-training
quantisation, calibrated with the normal training images and copies of them with fractal anomalies, since normal images
alone leave no room for the values that anomalies give. The image AUROC of each OpenVINO model is over
all test images."""


def write_report(jobs: Sequence[Job], output: Path) -> Path:
    """Write ``results.csv``, ``report.md`` and its pictures.

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
        budget = next((f"{unit}: {job.spec[unit]}" for unit in ("epochs", "steps") if job.spec[unit]), "its own")
        for name in ("train_batch_size", "precision"):
            if job.spec[name] is not None:
                budget += f", {name}: {job.spec[name]}"
        arguments = ", ".join(f"{name}: {json.dumps(value)}" for name, value in job.arguments.items())
        rows.append([job.model, budget, arguments, "; ".join(job.notes)])
    spec = jobs[0].spec
    machines = {json.dumps(record_of(job, output).content.get("environment")): None for job in jobs}
    versions = ", ".join(f"{name} {version}" for name, version in spec["versions"].items())
    facts = [
        f"Seeds: {', '.join(map(str, dict.fromkeys(job.seed for job in jobs)))}",
        f"image size: {_size(spec['image_size'])}",
        f"CPU threads: {spec['threads'] or 'the choice of each runtime'}",
        f"versions: {versions}",
    ]
    lines = [
        "; ".join(facts) + ".",
        *(_machine(json.loads(machine)) for machine in machines if machine != "null"),
        HOW_MEASURED.format(repetitions=jobs[0].measuring["repetitions"]),
    ]
    return "## What was run\n\n" + _table(["model", "budget", "arguments", "notes"], rows) + "\n\n" + "\n\n".join(lines)


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
    pictures: dict[str, tuple[str, Callable[[pd.DataFrame], Figure | None]]] = {
        "latency": ("Quality against latency", _plot_latency),
        "fit_time": ("Quality against fit time", _plot_fit_time),
        "defects": ("Image AUROC by type of defect", _plot_defects),
        "heat_maps": ("Heat maps", lambda _: _draw_sheet([job for job in jobs if job.data == name], output)),
    }
    for kind, (title, draw) in pictures.items():
        figure = draw(results)
        if figure is not None:
            figure.savefig(output / f"{kind}_{slug}.png", dpi=120, bbox_inches="tight")
            parts.append(f"### {title}\n\n![{title}]({kind}_{slug}.png)")
    return "\n\n".join(parts)


def _defects(results: pd.DataFrame) -> dict[str, tuple[str, int]]:
    return {name: (name.partition("/")[2], 3) for name in results if name.startswith("image_AUROC/")}


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


def _colours(results: pd.DataFrame) -> dict[str, Any]:
    palette = mpl.colormaps["tab10"]
    return {model: palette(i % 10) for i, model in enumerate(dict.fromkeys(results.model))}


def _plot_latency(results: pd.DataFrame) -> Figure | None:
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    drawn = set()
    for model, colour in _colours(results).items():
        group = results[results.model == model]
        for runtime, marker in MARKERS.items():
            latency = _mean(group, f"{runtime}/latency_ms")
            quality = _mean(group, "image_AUROC" if runtime == "torch" else f"{runtime}/image_AUROC")
            if latency is not None and quality is not None:
                axes.scatter(latency, quality, color=colour, marker=marker, s=60, edgecolors="black", linewidths=0.5)
                drawn.add((model, runtime))
    if not drawn:
        return None
    for model, colour in _colours(results).items():
        if any(model == name for name, _ in drawn):
            axes.scatter([], [], color=colour, marker="o", label=model)
    for runtime, marker in MARKERS.items():
        if any(runtime == name for _, name in drawn):
            axes.scatter([], [], color="white", edgecolors="black", marker=marker, label=RUNTIME_NAMES[runtime])
    axes.set(xlabel="latency of one image, ms", ylabel="image AUROC")
    _finish(axes, log=True)
    return figure


def _plot_fit_time(results: pd.DataFrame) -> Figure | None:
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for model, colour in _colours(results).items():
        group = results[results.model == model]
        seconds, quality = _mean(group, "fit_seconds"), _mean(group, "image_AUROC")
        if seconds is not None and quality is not None:
            spread = group["image_AUROC"].std() if len(group) > 1 else None
            axes.errorbar(seconds, quality, yerr=spread, color=colour, marker="o", capsize=3, linestyle="", label=model)
    if not axes.has_data():
        return None
    axes.set(xlabel="fit time, s", ylabel="image AUROC")
    _finish(axes, log=True)
    return figure


def _plot_defects(results: pd.DataFrame) -> Figure | None:
    columns = [name for name in _defects(results) if results[name].notna().any()]
    models = [model for model, group in results.groupby("model", sort=False) if group[columns].notna().any(axis=None)]
    if not columns or not models:
        return None
    figure = Figure(figsize=(max(7, 1.2 * len(columns) + 2), 4))
    axes = figure.subplots()
    width = 0.8 / len(models)
    colours = _colours(results)
    for i, model in enumerate(models):
        means = results[results.model == model][columns].mean()
        places = [column + (i - (len(models) - 1) / 2) * width for column in range(len(columns))]
        axes.bar(places, means, width, color=colours[model], label=model)
    axes.set_xticks(range(len(columns)), [name.partition("/")[2] for name in columns])
    axes.set(ylabel="image AUROC", ylim=(0, 1.02))
    _finish(axes)
    return figure


def _mean(group: pd.DataFrame, name: str) -> float | None:
    return float(group[name].mean()) if name in group and group[name].notna().any() else None


def _finish(axes: Any, log: bool = False) -> None:
    if log:
        axes.set_xscale("log")
        for axis in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis(StrMethodFormatter("{x:g}"))
        axes.tick_params(axis="x", which="both", rotation=45)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _draw_sheet(jobs: Sequence[Job], output: Path) -> Figure | None:
    """Images, masks, and the heat maps of every model with the first seed below them, with their scores."""
    records = {job.model: record_of(job, output) for job in jobs if job.seed == jobs[0].seed}
    shown = {model: record for model, record in records.items() if record.content.get("sheet")}
    if not shown:
        return None
    first = next(iter(shown.values()))
    sheet = first.content["sheet"]
    rows = ["image", *(["mask"] if any(first.folder.glob("mask_*.png")) else []), *shown]
    figure = Figure(figsize=(1.7 * len(sheet) + 1, 1.8 * len(rows)))
    grid = figure.subplots(len(rows), len(sheet), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        record = shown.get(row, first)
        for number, axes in enumerate(line):
            axes.set(xticks=[], yticks=[])
            file = record.folder / f"{'map' if row in shown else row}_{number}.png"
            if file.exists():
                axes.imshow(Image.open(file), cmap="gray")
            if row == "image":
                axes.set_title(Path(sheet[number]["image_path"]).parent.name, fontsize=9)
            if row in shown and "score" in record.content["sheet"][number]:
                axes.set_xlabel(f"{record.content['sheet'][number]['score']:.2f}", fontsize=8)
        line[0].set_ylabel(fill(row, 16), fontsize=9)
    return figure
