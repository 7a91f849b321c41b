# SPDX-License-Identifier: Apache-2.0
"""Draw a sheet from a checkpoint: images above, their masks below them where they have any, heat maps with scores last.

python examples/heat_map_sheet.py --checkpoint model.ckpt --images "[part/test/scratch/000.png]" \
    --masks "[part/ground_truth/scratch/000_mask.png]"
"""

from pathlib import Path

import anomalib.models
from anomalib.engine import Engine
from anomalib.visualization.image.functional import (
    add_text_to_image,
    create_image_grid,
    overlay_images,
    visualize_anomaly_map,
)
from jsonargparse import auto_cli
from PIL import Image


def draw_sheet(
    checkpoint: Path,
    images: list[Path],
    masks: list[Path] | None = None,
    model: str = "FractalAD",
    output: Path = Path("heat_maps.png"),
    size: int = 256,
) -> None:
    """Draw a sheet of heat maps.

    Args:
        checkpoint: A Lightning checkpoint of the model.
        images: The images to inspect.
        masks: Their true masks, in the same order.
        model: Name of the model.
        output: The image to write.
        size: Side of each image in pixels.
    """
    trained = getattr(anomalib.models, model).load_from_checkpoint(checkpoint, visualizer=False)
    engine = Engine(logger=False, enable_progress_bar=False)
    rows = [[Image.open(path).convert("RGB").resize((size, size)) for path in images]]
    if masks:
        rows.append([Image.open(path).convert("RGB").resize((size, size)) for path in masks])
    heat_maps = []
    for path, image in zip(images, rows[0], strict=True):
        (prediction,) = engine.predict(trained, data_path=path) or ()
        heat_map = visualize_anomaly_map(prediction.anomaly_map.squeeze()).resize(image.size)
        text = f"{prediction.pred_score.item():.2f} {'anomalous' if prediction.pred_label else 'normal'}"
        heat_maps.append(add_text_to_image(overlay_images(image, heat_map), text, size=size // 10))
    rows.append(heat_maps)
    output.parent.mkdir(parents=True, exist_ok=True)
    create_image_grid([image for row in rows for image in row], nrow=len(images)).save(output)


if __name__ == "__main__":
    auto_cli(draw_sheet, as_positional=False)
