# SPDX-License-Identifier: Apache-2.0
"""Train FractalAD, predict, and export to OpenVINO, through the Python API.

python examples/train_predict_export.py --backbone resnet18 --epochs 20
"""

from pathlib import Path

from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning import seed_everything

from anomalib_fractalad import FractalAD, SurfaceDefects


def train_predict_export(
    category: str = "fabric",
    backbone: str = "resnet18",
    pre_trained: bool = False,
    epochs: int = 40,
    data_root: Path = Path("datasets/SurfaceDefects"),
    results: Path = Path("results"),
    seed: int = 0,
    int8: bool = False,
) -> Path:
    """Train, test, predict and export.

    Args:
        category: Category of SurfaceDefects.
        backbone: Name of a timm CNN.
        pre_trained: Load ImageNet weights into the teacher, from the hub or its cache.
        epochs: Training length.
        data_root: Where the data set lies or is made.
        results: Where checkpoints, images and the exported model go.
        seed: Seed of the random numbers.
        int8: Quantize the exported model to INT8, calibrated with training images.

    Returns:
        The exported OpenVINO model.
    """
    seed_everything(seed)
    datamodule = SurfaceDefects(root=data_root, category=category)
    model = FractalAD(backbone=backbone, pre_trained=pre_trained, score="top")
    engine = Engine(max_epochs=epochs, check_val_every_n_epoch=epochs, default_root_dir=results)
    engine.fit(model, datamodule=datamodule)
    engine.test(model, datamodule=datamodule)

    for batch in engine.predict(model, data_path=data_root / category / "test") or []:
        for image in batch:
            print(f"{image.pred_score:.3f}  {'anomalous' if image.pred_label else 'normal   '}  {image.image_path}")

    exported = engine.export(
        model,
        ExportType.OPENVINO,
        export_root=results,
        compression_type=CompressionType.INT8_PTQ if int8 else None,
        datamodule=datamodule,
    )
    print(f"OpenVINO model: {exported}")
    return Path(str(exported))


if __name__ == "__main__":
    auto_cli(train_predict_export, as_positional=False)
