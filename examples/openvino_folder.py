# SPDX-License-Identifier: Apache-2.0
"""Inspect a folder of images with an exported OpenVINO model and write a heat map of each.

python examples/openvino_folder.py --model results/weights/openvino/model.xml --images path/to/images
"""

import sys
from pathlib import Path

import numpy as np
from anomalib.data.utils import get_image_filenames, read_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map
from jsonargparse import auto_cli
from PIL import Image


def inspect(model: Path, images: Path, output: Path = Path("heat_maps"), device: str = "CPU") -> None:
    """Print the score and label of every image and write its heat map; files that cannot be read are named and skipped.

    Args:
        model: The exported model (.xml).
        images: An image, or a folder that is searched for images.
        output: Folder of the heat maps, in the layout of the images' folder.
        device: OpenVINO device.
    """
    # On processors with bfloat16, OpenVINO would compute in it, and scores would differ from those in training.
    inferencer = OpenVINOInferencer(model, device, config={"INFERENCE_PRECISION_HINT": "f32"})
    images = images.resolve()
    for path in get_image_filenames(images):
        try:
            pixels = read_image(path)
        except OSError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        prediction = inferencer.predict(pixels)
        score, anomalous = prediction.pred_score.item(), prediction.pred_label.item()
        print(f"{score:.3f}  {'anomalous' if anomalous else 'normal   '}  {path}")

        picture = Image.fromarray((255 * pixels).round().astype(np.uint8))
        heat_map = visualize_anomaly_map(np.squeeze(prediction.anomaly_map)).resize(picture.size)
        file = output / path.relative_to(images if images.is_dir() else images.parent).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        overlay_images(picture, heat_map).save(file)


if __name__ == "__main__":
    auto_cli(inspect, as_positional=False)
