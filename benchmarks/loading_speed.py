# SPDX-License-Identifier: Apache-2.0
"""Whether reading images keeps up with training, by number of workers, and what a cache would save.

Run as ``python benchmarks/loading_speed.py``.
"""

import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from anomalib.data import ImageBatch, PredictDataset
from jsonargparse import auto_cli
from torch.utils.data import DataLoader
from training_speed import training_speed

from anomalib_fractalad.benchmark.surroundings import quiet
from anomalib_fractalad.data import SurfaceDefects
from anomalib_fractalad.training.loggers import LIGHTNING


def loading_speed(
    images: Path | None = None,
    backbone: str = "resnet18",
    batch_size: int = 16,
    image_size: int = 256,
    workers: tuple[int, ...] = (0, 1, 2, 4, 8),
    epochs: int = 3,
    device: str = "cpu",
    threads: int = 1,
    steps: int = 3,
) -> dict[str, float]:
    """Print how many images a second are read, and how many FractalAD trains on, in one run.

    An epoch is timed from the making of its loader's iterator, so that the start of the workers, which happens in every
    epoch, counts. The cache holds the decoded images: no loader could be faster.

    Args:
        images: A folder of images; left out, SurfaceDefects is made.
        backbone: Backbone of FractalAD.
        batch_size: Number of images in a batch.
        image_size: Height and width that training sees, in pixels.
        workers: Numbers of workers to try.
        epochs: Number of timed epochs for each; their median is taken.
        device: Device to train on: cpu or cuda.
        threads: Number of CPU threads of training.
        steps: Number of timed training steps.

    Returns:
        Images per second by way of reading them, and of training.
    """
    dataset = _training_images() if images is None else PredictDataset(images)
    items = [dataset[i] for i in range(len(dataset))]
    with quiet(*LIGHTNING):
        rates = _reading_rates(dataset, items, workers, batch_size, epochs)
    step = training_speed(backbone, batch_size, image_size, steps, device, threads, models=("FractalAD",), memory=False)
    rates["training"] = batch_size / step["FractalAD"]["step_s"]
    height, width = items[0].image.shape[-2:]
    print(f"{len(dataset)} images, the first of {height} x {width}, in batches of {batch_size}")
    for name, rate in rates.items():
        print(f"{name:18} {rate:9.1f} images/s", end="")
        print(f" {rate / rates['training']:7.1f} x training" if name != "training" else "")
    return rates


def _training_images() -> Any:
    data = SurfaceDefects()
    data.prepare_data()
    data.setup()
    return data.train_data


def _reading_rates(
    dataset: Any, items: list[Any], workers: tuple[int, ...], batch_size: int, epochs: int
) -> dict[str, float]:
    rates = {}
    for count in workers:
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_size=batch_size, shuffle=True, num_workers=count, collate_fn=ImageBatch.collate
        )
        rates[f"{count} workers"] = _images_per_second(loader, len(dataset), epochs)
    cached: DataLoader[Any] = DataLoader(
        cast("Any", items), batch_size=batch_size, shuffle=True, collate_fn=ImageBatch.collate
    )
    rates["cache, 0 workers"] = _images_per_second(cached, len(dataset), epochs)
    return rates


def _images_per_second(loader: Iterable[Any], count: int, epochs: int) -> float:
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for _batch in loader:
            pass
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds)


if __name__ == "__main__":
    auto_cli(loading_speed, as_positional=False)
