# SPDX-License-Identifier: Apache-2.0
"""Models with a region of interest: how it gets into the network, and which images it fits."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anomalib.data import ImageBatch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from anomalib_fractalad.export.module import ExportModule
from anomalib_fractalad.export.pre_processing import network_size
from anomalib_fractalad.training.loaders import current_loaders, datasets_of

from .region import RegionOfInterest, check_proportions, read_roi, record

# Mixed in before ExportModule, not derived from it.
if TYPE_CHECKING:
    _Base = ExportModule
else:
    _Base = object


class RegionModule(_Base):
    """A module whose network may have a region of interest.

    Attributes:
        roi: The region as plain data.
    """

    roi: str | None = None

    def set_roi(self, roi: str | Path | None) -> None:
        """Take a region of interest, or none.

        Args:
            roi: A mask image, white on what counts.

        Raises:
            ValueError: If nothing is inside, or nothing is left in the size that the network sees.
            UnreadableImageError: If the file cannot be read as an image.
            FileNotFoundError: If there is no such file.
        """
        self.roi = None if roi is None else record(roi)
        self._fit_region()

    def _fit_region(self) -> None:
        """Bring the region to the size that the pre-processor makes of images."""
        region = None if self.roi is None else RegionOfInterest(read_roi(self.roi), self._transform)
        if region is not None or getattr(self.model, "region", None) is not None:
            self.model.region = region if region is None else region.to(self.device)  # type: ignore[assignment]

    def apply_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Change arguments of a model that exists; see the base class."""
        super().apply_arguments(arguments)  # type: ignore[misc]
        self._fit_region()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the region to the checkpoint's pre-processor."""
        super().on_load_checkpoint(checkpoint)
        self._fit_region()

    def setup(self, stage: str) -> None:
        """Fit the region to the pre-processor of this run."""
        super().setup(stage)
        self._fit_region()

    def before_export(self, input_size: tuple[int, int] | None = None) -> None:
        """Fit the region to the pre-processor, and refuse images of a size that it does not fit.

        Raises:
            ValueError: If images of the size are transformed to another size than the region.
        """
        super().before_export(input_size)
        self._fit_region()
        if self.roi is not None and input_size is not None:
            region = cast("RegionOfInterest", self.model.region)
            check_proportions(region.source_size, [(input_size[1], input_size[0])])
            region.check_size(network_size(self._transform, input_size) or input_size)

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX; where the pre-processor takes images of many sizes to as many, for those of the region's.

        Args:
            export_root: Folder to export into.
            model_file_name: Name of the file, without its ending.
            input_size: Height and width of images.
            **kwargs: Passed on to :func:`torch.onnx.export`.

        Returns:
            The ONNX file.
        """
        if input_size is None and self.roi is not None and self.input_size is None:
            height, width = read_roi(self.roi).shape
            input_size = height, width
        return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def on_train_start(self) -> None:
        """Refuse images that the region does not fit."""
        super().on_train_start()
        self._check_proportions()

    def on_validation_start(self) -> None:
        """Refuse images that the region does not fit."""
        super().on_validation_start()
        if self.trainer.state.fn == "validate":
            self._check_proportions()

    def on_test_start(self) -> None:
        """Refuse images that the region does not fit."""
        super().on_test_start()
        self._check_proportions()

    def on_predict_start(self) -> None:
        """Refuse images that the region does not fit."""
        super().on_predict_start()
        self._check_proportions()

    def _check_proportions(self) -> None:
        if self.roi is None:
            return
        size = tuple(read_roi(self.roi).shape)
        for dataset in datasets_of(current_loaders(self.trainer)):
            for path in _image_paths(dataset):
                try:
                    with Image.open(path) as image:
                        image_size = image.size
                except Exception:  # noqa: S112  # what cannot be read is told elsewhere
                    continue
                try:
                    check_proportions(size, [image_size])
                except ValueError as error:
                    msg = f"{path} does not fit: {error}"
                    raise ValueError(msg) from None

    def within_region(self, batch: ImageBatch) -> ImageBatch:
        """Leave defects outside the region out of the masks that predictions are measured by.

        Args:
            batch: A batch with masks (B, H, W), or without.
        """
        region = getattr(self.model, "region", None)
        mask: Tensor | None = batch.gt_mask
        if region is not None and mask is not None and mask.shape[-2:] == region.inside.shape[-2:]:
            batch.gt_mask = mask * region.inside[0].to(mask.dtype)
        return batch


def _image_paths(dataset: Dataset[Any]) -> list[str]:
    if hasattr(dataset, "image_filenames"):
        return [str(path) for path in dataset.image_filenames]
    samples = getattr(dataset, "samples", None)
    return list(samples["image_path"]) if samples is not None and "image_path" in samples else []
