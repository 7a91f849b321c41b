# SPDX-License-Identifier: Apache-2.0
"""Draw a sheet of generated anomalies: originals above, anomalous images in the middle, masks below.

python examples/generate_anomalies.py --images path/to/good/images --output anomalies.png
"""

from itertools import islice
from pathlib import Path

import torch
from anomalib.data import PredictDataset
from jsonargparse import auto_cli
from torchvision.transforms.v2 import Resize
from torchvision.utils import save_image

from anomalib_fractalad import FractalAnomalyGenerator, SurfaceDefects


def generate(
    images: Path | None = None,
    output: Path = Path("anomalies.png"),
    count: int = 8,
    size: int = 256,
    object_mode: bool = False,
    seed: int = 0,
) -> None:
    """Draw a sheet of generated anomalies.

    Args:
        images: A folder of normal images, or one image. Left out, images of SurfaceDefects are taken.
        output: The image to write.
        count: Number of images.
        size: Side of each image in pixels.
        object_mode: Keep anomalies on the object and scale them to its size.
        seed: Seed of the random numbers.
    """
    if images is None:
        datamodule = SurfaceDefects()
        datamodule.prepare_data()
        images = datamodule.root / datamodule.category / "train" / "good"
    torch.manual_seed(seed)
    resize = Resize((size, size), antialias=True)
    originals = torch.stack([resize(item.image) for item in islice(PredictDataset(images), count)])
    anomalous, masks = FractalAnomalyGenerator(object_mode=object_mode)(originals)
    save_image(torch.cat([originals, anomalous, masks.expand_as(originals)]), output, nrow=len(originals))


if __name__ == "__main__":
    auto_cli(generate, as_positional=False)
