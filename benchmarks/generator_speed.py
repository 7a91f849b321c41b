# SPDX-License-Identifier: Apache-2.0
"""Time of FractalAnomalyGenerator beside anomalib's PerlinAnomalyGenerator.

Run as ``python benchmarks/generator_speed.py``.
"""

import statistics
from collections.abc import Callable

import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.benchmark import Timer

from anomalib_fractalad.transforms import FractalAnomalyGenerator


def generator_speed(
    batch_size: int = 32,
    image_size: int = 256,
    repetitions: int = 15,
    device: str = "cpu",
    threads: int = 1,
) -> dict[str, float]:
    """Print the median time of a batch and its ratio to the Perlin generator's, repetitions interleaved.

    Args:
        batch_size: Number of images in a batch.
        image_size: Height and width of the images in pixels.
        repetitions: Number of timed batches for each generator, each after two that are not timed.
        device: Device of the images; on another one than the CPU, images per second are what matters.
        threads: Number of CPU threads.

    Returns:
        Images per second by generator.
    """
    torch.manual_seed(0)
    images = torch.rand(batch_size, 3, image_size, image_size, device=device)
    fractal = FractalAnomalyGenerator()
    generators: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
        "fractal": fractal,
        "fractal, augment": fractal.augment,
        "fractal, object mode": FractalAnomalyGenerator(object_mode=True),
        "Perlin, probability 0.5 (its default)": PerlinAnomalyGenerator(),
        "Perlin, probability 1": PerlinAnomalyGenerator(probability=1.0),
    }
    timers = {
        name: Timer("generator(images)", globals={"generator": generator, "images": images}, num_threads=threads)
        for name, generator in generators.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repetitions):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(1).median)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{batch_size} images of {image_size} x {image_size} on {device}, {threads} CPU thread(s)")
    for name, median in medians.items():
        ratio = median / medians["fractal"]
        print(f"{name:38} {1e3 * median:9.2f} ms {batch_size / median:12.0f} images/s {ratio:7.2f} x fractal")
    return {name: batch_size / median for name, median in medians.items()}


if __name__ == "__main__":
    auto_cli(generator_speed, as_positional=False)
