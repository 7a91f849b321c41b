# SPDX-License-Identifier: Apache-2.0
"""The comparison's plots and its sheet of heat maps."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from anomalib_fractalad.benchmark.config import RUNTIMES, Job
from anomalib_fractalad.benchmark.record import record_of

RUNTIME_NAMES = dict(zip(RUNTIMES, ("torch", "OpenVINO FP32", "OpenVINO FP16", "OpenVINO INT8"), strict=True))
MARKERS = "osD^vP*X<>"
CHANCE = 0.5
NAMED = 3
LEVEL = 0.01  # image AUROCs that differ by less are called level


def defect_columns(results: pd.DataFrame) -> list[str]:
    """Names of the columns that hold the image AUROC of one type of defect each.

    Args:
        results: As for :func:`plot_latency`.
    """
    return [name for name in results if name.startswith("image_AUROC/")]


def plot_latency(results: pd.DataFrame) -> Figure | None:
    """Plot image AUROC against latency, of each model in the runtime that is fastest with it.

    Args:
        results: A row for each job, as in ``results.csv``.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    points = {}
    for model, group in results.groupby("model", sort=False):
        measured = {}
        for runtime, name in RUNTIME_NAMES.items():
            latency = _mean(group, f"{runtime}/latency_ms")
            quality = _mean(group, "image_AUROC" if runtime == "torch" else f"{runtime}/image_AUROC")
            if latency is not None and quality is not None:
                measured[f"{model}, {name}"] = (latency, quality)
        if measured:
            label = min(measured, key=lambda label: measured[label][0])
            latency, quality = measured[label]
            points[model] = _Point(label, latency, quality, quality, quality)
    return _plot_quality(results, points, "latency of one image, ms", "answers fastest, in {:.3g} ms")


def plot_fit_time(results: pd.DataFrame) -> Figure | None:
    """Plot image AUROC against the time of training, with a bar from the lowest to the highest seed.

    Args:
        results: As for :func:`plot_latency`.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    points = {}
    for model, group in results.groupby("model", sort=False):
        seconds, quality = _mean(group, "fit_seconds"), _mean(group, "image_AUROC")
        if seconds is not None and quality is not None:
            low, high = group["image_AUROC"].min(), group["image_AUROC"].max()
            points[model] = _Point(str(model), seconds, quality, low, high)
    return _plot_quality(results, points, "fit time, s", "is fastest to train, in {:.3g} s")


def plot_defects(results: pd.DataFrame) -> Figure | None:
    """Plot each model's image AUROC by type of defect.

    Args:
        results: As for :func:`plot_latency`.

    Returns:
        The figure; ``None`` where nothing was measured.
    """
    columns = [name for name in defect_columns(results) if results[name].notna().any()]
    if not columns:
        return None
    means = results.groupby("model", sort=False)[columns].mean().dropna(how="all")
    best = means.max().sort_values()
    figure, axes = _axes(height=1.5 + 0.45 * len(columns))
    for place, (model, row) in enumerate(means.iterrows()):
        axes.scatter(row[best.index], range(len(best)), **_style(results, model), s=55, zorder=3 + place, label=model)
    axes.set_yticks(range(len(best)), [name.partition("/")[2] for name in best.index])
    axes.set_ylim(len(best) - 0.5, -0.5)
    hardest = best.index[0].partition("/")[2]
    _finish(axes, f"Hardest to find: {hardest}, with an image AUROC of {best.iloc[0]:.2f} at best")
    _limit(axes.set_xlim, means.min())
    axes.set_xlabel("image AUROC")
    return figure


class _Point(NamedTuple):
    """A model's image AUROC, on average and over seeds, and what it costs."""

    label: str
    cost: float
    quality: float
    low: float
    high: float


def _plot_quality(results: pd.DataFrame, points: dict[str, _Point], cost: str, first: str) -> Figure | None:
    if not points:
        return None
    figure, axes = _axes()
    for place, (model, point) in enumerate(points.items()):
        axes.plot([point.cost, point.cost], [point.low, point.high], color="gray", zorder=2)
        style = _style(results, model)
        axes.scatter(point.cost, point.quality, **style, s=70, zorder=3 + place, label=point.label)
    cheapest = min(points, key=lambda model: points[model].cost)
    title = _ranking({model: point.quality for model, point in points.items()})
    _finish(axes, f"{title}\n{cheapest} {first.format(points[cheapest].cost)}")
    _scale(axes, cost, [point.cost for point in points.values()])
    _limit(axes.set_ylim, [point.low for point in points.values()])
    axes.set_ylabel("image AUROC")
    return figure


def _axes(height: float = 4) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6, height))
    return figure, figure.subplots()


def _style(results: pd.DataFrame, model: str) -> dict[str, Any]:
    """Marker and color of a model, which differ in gray, too."""
    models = list(dict.fromkeys(results.model))
    number, count = models.index(model), len(models)
    color = mpl.colormaps["viridis"](number / max(count - 1, 1))
    return {"marker": MARKERS[number % len(MARKERS)], "color": [color], "edgecolors": "black", "linewidths": 0.6}


def _ranking(quality: dict[str, float]) -> str:
    """Which models are best, in words."""
    highest = max(quality.values())
    leaders = [model for model, value in quality.items() if value > highest - LEVEL]
    if len(leaders) == 1:
        return f"{leaders[0]} has the best image AUROC, {highest:.3f}"
    named = f"{', '.join(leaders[:-1])} and {leaders[-1]}"
    who = named if len(leaders) <= NAMED else f"{len(leaders)} of {len(quality)} models"
    lowest = min(quality[model] for model in leaders)
    return f"{who} are level in image AUROC, {lowest:.3f} to {highest:.3f}"


def _limit(set_limits: Any, values: Any) -> None:
    """From chance to 1, or from 0 where a model is worse than chance: less would blow up noise."""
    set_limits(CHANCE - 0.02 if min(values) >= CHANCE else 0, 1.02)


def _scale(axes: Any, label: str, values: list[float]) -> None:
    """A logarithmic axis with plain numbers that spans a decade at least."""
    low, high = min(values), max(values)
    margin = max(1.3, (10 * low / high) ** 0.5)
    axes.set_xscale("log")
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(label)


def _mean(group: pd.DataFrame, name: str) -> float | None:
    return float(group[name].mean()) if name in group and group[name].notna().any() else None


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
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
