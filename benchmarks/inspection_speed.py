# SPDX-License-Identifier: Apache-2.0
"""Time of an image from file to decision in a part folder, as a multiple of the network's own.

python benchmarks/inspection_speed.py --part part1 --images path/to/images
"""

import time
from pathlib import Path
from statistics import median

import numpy as np
from jsonargparse import auto_cli

from anomalib_fractalad.inspection import Inspector, find_images, open_rgb


def measure(part: Path, images: Path, rounds: int = 20, network: str | None = None) -> None:
    """Print the medians and their ratio; both are measured in turns, on the same images.

    Args:
        part: The part folder.
        images: Images, or a folder of them.
        rounds: How often each image is inspected.
        network: A file of the part folder to use in place of its choice, such as model/fp32.xml.
    """
    inspector = Inspector(part, network=network)
    paths = find_images([images])
    arrays = [np.asarray(open_rgb(path)).transpose(2, 0, 1)[None].astype(np.float32) / 255 for path in paths]
    whole, own = [], []
    for turn in range(rounds + 1):
        for path, array in zip(paths, arrays, strict=True):
            milliseconds = inspector.inspect(path)["milliseconds"]
            start = time.perf_counter()
            inspector.request.infer([array])
            if turn:  # the first round warms up
                whole.append(milliseconds)
                own.append(1000 * (time.perf_counter() - start))
    print(
        f"from file to decision {median(whole):.2f} ms, network {median(own):.2f} ms: {median(whole) / median(own):.2f}"
    )


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
