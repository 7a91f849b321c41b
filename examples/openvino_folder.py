# SPDX-License-Identifier: Apache-2.0
"""Inspect a folder of images with an exported OpenVINO model and write a heat map of each.

python examples/openvino_folder.py --model results/weights/openvino/model.xml --images path/to/images
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from anomalib.data.utils import get_image_filenames
from anomalib.deploy import OpenVINOInferencer
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map
from jsonargparse import auto_cli
from PIL import Image

from anomalib_fractalad.image_files import read_image
from anomalib_fractalad.repairs.image_paths import every_script


def inspect(model: Path, images: Path, output: Path = Path("heat_maps"), device: str = "CPU") -> None:
    """Print the score and label of every image and write its heat map; files that cannot be read are named and skipped.

    Args:
        model: The exported model (.xml).
        images: An image, or a folder that is searched for images.
        output: Folder of the heat maps, in the layout of the images' folder; its own images are not inspected. The heat
            map of part.jpg is part.jpg.png.
        device: OpenVINO device.

    Raises:
        ValueError: If the images lie in the folder of the heat maps.
    """
    images, output = images.resolve(), output.resolve()
    if images.is_relative_to(output):
        msg = f"the images, {images}, lie in {output}, the folder of the heat maps: choose another with --output"
        raise ValueError(msg)
    root = images if images.is_dir() else images.parent
    inferencer = load(model.resolve(), device)
    with every_script():  # or anomalib would refuse letters outside ASCII
        paths = get_image_filenames(images)
    for path in paths:
        if path.is_relative_to(output):
            continue
        try:
            pixels = read_image(path)
        except OSError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        prediction = inferencer.predict(pixels)
        score, anomalous = prediction.pred_score.item(), prediction.pred_label.item()
        print(f"{score:.3f}  {'anomalous' if anomalous else 'normal   '}  {path}")

        image = Image.fromarray((255 * pixels).round().astype(np.uint8))
        heat_map = visualize_anomaly_map(np.squeeze(prediction.anomaly_map)).resize(image.size)
        file = output / path.relative_to(root).with_name(f"{path.name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        overlay_images(image, heat_map).save(file)


def load(model: Path, device: str) -> OpenVINOInferencer:
    """Load a model; what anomalib caches of it goes to a temporary folder, not to the current one.

    Args:
        model: The exported model (.xml), an absolute path.
        device: OpenVINO device.
    """
    before = Path.cwd()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        try:
            # On processors with bfloat16, OpenVINO would compute in it, and scores would differ from those in training.
            return OpenVINOInferencer(model, device, config={"INFERENCE_PRECISION_HINT": "f32"})
        finally:
            os.chdir(before)


if __name__ == "__main__":
    auto_cli(inspect, as_positional=False)
