# SPDX-License-Identifier: Apache-2.0
"""The comparison's plots and its sheet of heat maps."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image

from anomalib_fractalad.benchmark.config import RUNTIMES, Job
from anomalib_fractalad.benchmark.record import record_of

RUNTIME_NAMES = dict(zip(RUNTIMES, ("torch", "OpenVINO FP32", "OpenVINO FP16", "OpenVINO INT8"), strict=True))
MARKERS = dict(zip(RUNTIMES, "osD^", strict=True))


def defect_columns(results: pd.DataFrame) -> list[str]:
    """Names of the columns that hold the image AUROC of one type of defect each.

    Args:
        results: As for :func:`plot_latency`.
    """
    return [name for name in results if name.startswith("image_AUROC/")]


def _colors(results: pd.DataFrame) -> dict[str, Any]:
    palette = mpl.colormaps["tab10"]
    return {model: palette(i % 10) for i, model in enumerate(dict.fromkeys(results.model))}


def plot_latency(results: pd.DataFrame) -> Figure | None:
    """Plot image AUROC against the latency of each model in each runtime.

    Args:
        results: A row for each job, as in ``results.csv``.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    drawn = set()
    for model, color in _colors(results).items():
        group = results[results.model == model]
        for runtime, marker in MARKERS.items():
            latency = _mean(group, f"{runtime}/latency_ms")
            quality = _mean(group, "image_AUROC" if runtime == "torch" else f"{runtime}/image_AUROC")
            if latency is not None and quality is not None:
                axes.scatter(latency, quality, color=color, marker=marker, s=60, edgecolors="black", linewidths=0.5)
                drawn.add((model, runtime))
    if not drawn:
        return None
    for model, color in _colors(results).items():
        if any(model == name for name, _ in drawn):
            axes.scatter([], [], color=color, marker="o", label=model)
    for runtime, marker in MARKERS.items():
        if any(runtime == name for _, name in drawn):
            axes.scatter([], [], color="white", edgecolors="black", marker=marker, label=RUNTIME_NAMES[runtime])
    axes.set(xlabel="latency of one image, ms", ylabel="image AUROC")
    _finish(axes, log=True)
    return figure


def plot_fit_time(results: pd.DataFrame) -> Figure | None:
    """Plot image AUROC against the time of training.

    Args:
        results: As for :func:`plot_latency`.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for model, color in _colors(results).items():
        group = results[results.model == model]
        seconds, quality = _mean(group, "fit_seconds"), _mean(group, "image_AUROC")
        if seconds is not None and quality is not None:
            spread = group["image_AUROC"].std() if len(group) > 1 else None
            axes.errorbar(seconds, quality, yerr=spread, color=color, marker="o", capsize=3, linestyle="", label=model)
    if not axes.has_data():
        return None
    axes.set(xlabel="fit time, s", ylabel="image AUROC")
    _finish(axes, log=True)
    return figure


def plot_defects(results: pd.DataFrame) -> Figure | None:
    """Plot each model's image AUROC by type of defect.

    Args:
        results: As for :func:`plot_latency`.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    columns = [name for name in defect_columns(results) if results[name].notna().any()]
    models = [model for model, group in results.groupby("model", sort=False) if group[columns].notna().any(axis=None)]
    if not columns or not models:
        return None
    figure = Figure(figsize=(max(7, 1.2 * len(columns) + 2), 4))
    axes = figure.subplots()
    width = 0.8 / len(models)
    colors = _colors(results)
    for i, model in enumerate(models):
        means = results[results.model == model][columns].mean()
        places = [column + (i - (len(models) - 1) / 2) * width for column in range(len(columns))]
        axes.bar(places, means, width, color=colors[model], label=model)
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


def draw_sheet(jobs: Sequence[Job], output: Path) -> Figure | None:
    """Draw images, masks, and the heat maps of every model with the first seed below them, with their scores.

    Args:
        jobs: Jobs on one data set.
        output: Folder of the results.

    Returns:
        The figure; ``None`` where no job came so far.
    """
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
                axes.set_xlabel(f"{record.content['sheet'][number]['score']:.3g}", fontsize=8)
        line[0].set_ylabel(fill(row, 16), fontsize=9)
    return figure
