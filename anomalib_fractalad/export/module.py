# SPDX-License-Identifier: Apache-2.0
"""Export of the package's models, the same for all of them."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import nn
from torch.export import Dim

from .openvino import decide_constant_choices, leave_nothing_behind, quantize_features
from .resize import keep_antialiasing

# anomalib lists only the direct subclasses of AnomalibModule, so what they share has to come from beside it.
if TYPE_CHECKING:
    from openvino import Model

    _Base = AnomalibModule
else:
    _Base = object

logger = logging.getLogger(__name__)

EXPORT_OPSET = 18  # grid_sample needs 16; torch's exporter writes 18 and can only fail to go below


class ExportModule(_Base):
    """Export to ONNX and OpenVINO that scores as training does."""

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self._keep_antialiasing_in_export()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prepare the pre-processor that the checkpoint holds for export."""
        super().on_load_checkpoint(checkpoint)
        self._keep_antialiasing_in_export()

    def _keep_antialiasing_in_export(self) -> None:
        if isinstance(self.pre_processor, PreProcessor):
            self.pre_processor.export_transform = keep_antialiasing(self.pre_processor.transform)

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX, with operators of opset 18 unless told otherwise.

        Args:
            export_root: Folder to export into.
            model_file_name: Name of the file, without its ending.
            input_size: Height and width; left out, any size is taken (at least 64x96 without a pre-processor that
                resizes).
            **kwargs: Passed on to :func:`torch.onnx.export`.

        Returns:
            The ONNX file.
        """
        kwargs = {"opset_version": EXPORT_OPSET, "verbose": False, **kwargs}
        if input_size is None and self.input_size is None:
            # anomalib's example image of 2x2 would be frozen into a network whose deepest stage has stride 32.
            batch, height, width = Dim("batch_size"), Dim("height", min=64), Dim("width", min=96)
            kwargs.setdefault("dynamic_shapes", ({0: batch, 2: height, 3: width},))
        self._warn_without_thresholds(self.post_processor)
        with leave_nothing_behind():
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def _warn_without_thresholds(self, post_processor: nn.Module | None) -> None:
        if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
            return
        if post_processor.image_threshold.isnan():
            logger.warning(
                "%s was never validated, so it has no thresholds: exported, it compares raw scores with %g. Run "
                "engine.validate first.",
                self.name,
                float(post_processor.normalized_image_threshold),
            )

    def to_openvino(self, *args: Any, ov_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Path:
        """Export to OpenVINO.

        Args:
            *args: As for anomalib's :meth:`to_openvino`.
            ov_kwargs: Passed on to :func:`openvino.convert_model`; an ``extension`` comes beside the package's own.
            **kwargs: As for anomalib's :meth:`to_openvino`.

        Returns:
            The .xml file.
        """
        if find_spec("openvino") is not None:  # or anomalib says that it is missing
            given = (ov_kwargs or {}).get("extension") or []
            extensions = [decide_constant_choices(), *(given if isinstance(given, list) else [given])]
            ov_kwargs = {**(ov_kwargs or {}), "extension": extensions}
        return super().to_openvino(*args, ov_kwargs=ov_kwargs, **kwargs)  # type: ignore[misc]

    @staticmethod
    def _post_training_quantization_ov(model: "Model", datamodule: AnomalibDataModule | None = None) -> "Model":
        if datamodule is None:
            msg = "INT8 needs images to calibrate with; give the export a datamodule"
            raise ValueError(msg)
        datamodule.setup("fit")  # anomalib's own would go on with NNCF's defaults
        return quantize_features(model, datamodule.val_dataloader())
