# SPDX-License-Identifier: Apache-2.0
"""Hours of training, prediction and export in one process: do memory and open files level off?

Run as ``python benchmarks/soak.py --minutes 60 --output results/soak``.
"""

import csv
import gc
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model
from jsonargparse import auto_cli
from lightning import seed_everything
from matplotlib.figure import Figure

from anomalib_fractalad.benchmark.surroundings import cpu_threads, trusted_files, working_directory
from anomalib_fractalad.data import SurfaceDefects
from anomalib_fractalad.models.components.lightning_module import OneClassModule
from anomalib_fractalad.registration import MODELS

COUNTS = ("open_files", "threads", "child_processes")
COLUMNS = ("round", "minutes", "memory_mib", *COUNTS)
MEMORY_GROWTH = 0.03
COUNT_GROWTH = 1.0

Row = dict[str, float]


def soak(
    minutes: float = 60.0,
    output: Path = Path("results/soak"),
    backbone: str = "resnet18",
    image_size: int = 128,
    num_workers: int = 2,
    threads: int = 1,
) -> bool:
    """Train, test, predict and export all models in turn until the time is up; then say whether resources grow.

    A round is one epoch of each model on SurfaceDefects, test and prediction of its test images, export to torch, ONNX
    and OpenVINO, and a prediction by each exported model. After each round and a garbage collection, a row of resources
    is added to OUTPUT/soak.csv. OUTPUT/soak.png shows the rows.

    The verdict rests on straight lines through the later half of the rounds: see :func:`verdict`.

    Args:
        minutes: Minutes after which no other round begins; two rounds are always run.
        output: Folder of the results, and of the data set.
        backbone: The models' backbone, without pre-trained weights.
        image_size: Height and width of the images in pixels, a multiple of 128.
        num_workers: Worker processes of each data loader.
        threads: CPU threads.

    Returns:
        Whether all is level.
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    datamodule = SurfaceDefects(output / "data", "metal_plate", num_workers=num_workers)
    start, rows = time.monotonic(), list[Row]()
    with (output / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        while len(rows) < 2 or time.monotonic() - start < 60 * minutes:
            for name in MODELS:
                seed_everything(len(rows))
                with (
                    TemporaryDirectory() as folder,
                    working_directory(Path(folder)),
                    trusted_files(),
                    cpu_threads(threads),
                ):
                    _use(name, backbone, image_size, datamodule, Path(folder))
            rows.append({"round": len(rows) + 1, "minutes": (time.monotonic() - start) / 60, **resources()})
            writer.writerow(rows[-1])
            file.flush()
            print("  ".join(f"{name} {value:.1f}" for name, value in rows[-1].items()))
    _plot(rows, output / "soak.png")
    return verdict(rows)


def _use(name: str, backbone: str, image_size: int, datamodule: SurfaceDefects, folder: Path) -> None:
    """Take a model through its whole life."""
    pre_processor = OneClassModule.configure_pre_processor((image_size, image_size))
    model = get_model(name, backbone=backbone, pre_trained=False, pre_processor=pre_processor)
    engine = Engine(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule=datamodule)
    engine.test(model, datamodule=datamodule, verbose=False)
    image = Path(datamodule.test_data.samples.image_path[0])
    engine.predict(model, data_path=image.parent)
    torch_file, onnx_file, openvino_file = (
        str(engine.export(model, kind, export_root=folder))
        for kind in (ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO)
    )
    TorchInferencer(torch_file, device="cpu").predict(image)
    for file in (onnx_file, openvino_file):
        OpenVINOInferencer(file, "CPU").predict(image)


def resources() -> Row:
    """What this process holds, after a garbage collection: memory in MiB and the counts, as named in COLUMNS."""
    gc.collect()
    process = psutil.Process()
    counts = (process.num_fds(), process.num_threads(), len(process.children(recursive=True)))
    return {"memory_mib": process.memory_info().rss / 2**20, **dict(zip(COUNTS, counts, strict=True))}


def verdict(rows: list[Row]) -> bool:
    """Print how much each resource rises along a straight line through the later half of the rounds.

    Args:
        rows: One for each round, at least two.

    Returns:
        Whether memory rises by less than 3 % and each count by less than one.
    """
    later = rows[min(len(rows) // 2, len(rows) - 2) :]
    print(f"{len(rows)} rounds in {rows[-1]['minutes']:.0f} min; the last {len(later)}:")
    levels = []
    for name in ("memory_mib", *COUNTS):
        values = np.array([row[name] for row in later])
        rise = np.polyfit(np.arange(len(later)), values, 1)[0] * (len(later) - 1)
        limit = MEMORY_GROWTH * values.mean() if name == "memory_mib" else COUNT_GROWTH
        levels.append(bool(rise < limit))
        state = "level" if levels[-1] else "GROWS"
        print(f"{name:16} mean {values.mean():8.1f}  rise {rise:+8.2f}  limit {limit:6.1f}  {state}")
    return all(levels)


def _plot(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, counts = figure.subplots(2, sharex=True)
    minutes = [row["minutes"] for row in rows]
    memory.plot(minutes, [row["memory_mib"] for row in rows], marker=".")
    memory.set_ylabel("resident memory (MiB)")
    for name in COUNTS:
        counts.plot(minutes, [row[name] for row in rows], marker=".", label=name.replace("_", " "))
    counts.set_xlabel("minutes")
    counts.legend()
    for axes in (memory, counts):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    auto_cli(soak, as_positional=False)
