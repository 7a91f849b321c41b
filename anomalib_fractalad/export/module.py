# SPDX-License-Identifier: Apache-2.0
"""Export of the package's models, the same for all of them.

An image's way to the exported score: transforms of the pre-processor (``pre_processing``, ``resize``), the network
(``networks``), anomalib's post-processor, conversion (``openvino``) and compression (``int8``).
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import nn
from torch.export import Dim
from torchmetrics import Metric
from torchvision.transforms.v2 import Transform

from .compression import check_compression, compress, compress_file
from .memory import leave_nothing_behind, quiet
from .networks import exportable
from .openvino import decide_constant_choices, mark_as_own
from .pre_processing import exportable_transform, is_frozen, network_size, resizes

# anomalib lists only the direct subclasses of AnomalibModule, so what they share has to come from beside it.
if TYPE_CHECKING:
    from openvino import Model

    _Base = AnomalibModule
else:
    _Base = object

logger = logging.getLogger(__name__)

PADDED_BY_SIZE = Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, AvgPool2dSame
EXPORT_OPSET = 18  # grid_sample needs 16; torch's exporter writes 18 and can only fail to go below


class ExportModule(_Base):
    """Export to ONNX and OpenVINO that scores as training does.

    Attributes:
        takes_any_size: Whether the network itself can be exported for images of any size.
    """

    takes_any_size = False

    def __init__(self, *components: Any, **named: Any) -> None:
        super().__init__(*components, **named)
        self._keep_transform_in_inference()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Have inference transform images as the checkpoint's training did."""
        super().on_load_checkpoint(checkpoint)
        self._keep_transform_in_inference()

    def _keep_transform_in_inference(self) -> None:
        if isinstance(self.pre_processor, PreProcessor):  # anomalib's own would leave antialiasing out
            self.pre_processor.export_transform = self.pre_processor.transform

    @property
    def _transform(self) -> Transform | None:
        transform: Transform | None = getattr(self.pre_processor, "transform", None)
        return transform

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the network sees, or ``None`` where they follow from the image's."""
        return network_size(self._transform)

    def before_export(self, input_size: tuple[int, int] | None = None) -> None:
        """Called before each export: models refuse here what they cannot export, and warn.

        Args:
            input_size: Height and width of images that the exported network is to take, if they are given.
        """

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export for anomalib's ``TorchInferencer``.

        Args:
            export_root: Folder to export into.
            model_file_name: Name of the file, without its ending.

        Returns:
            The .pt file.
        """
        self.before_export()
        self._keep_transform_in_inference()
        return super().to_torch(export_root, model_file_name)

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
            input_size: Height and width of images; left out, any size is taken (at least 64x96 by FractalAD without a
                pre-processor).
            **kwargs: Passed on to :func:`torch.onnx.export`.

        Returns:
            The ONNX file.

        Raises:
            ValueError: If the pre-processor's transform is random, or ``input_size`` is left out and needed: where the
                size that the network sees follows from the image's, but for FractalAD with a backbone whose
                convolutions do not pad by the image's size, as timm's ``tf_`` models do.
        """
        self.before_export(input_size)
        kwargs = {"opset_version": EXPORT_OPSET, "verbose": False, **kwargs}
        any_size = input_size is None and self.input_size is None
        if any_size:
            self._refuse_any_size()
            if not resizes(self._transform):
                # anomalib's example image of 2x2 would be frozen into a network whose deepest level has stride 32.
                batch, height, width = Dim("batch_size"), Dim("height", min=64), Dim("width", min=96)
                kwargs.setdefault("dynamic_shapes", ({0: batch, 2: height, 3: width},))
        self._warn_without_thresholds(self.post_processor)
        with leave_nothing_behind(), quiet(), self._exportable(input_size):
            file = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        if any_size and self._transform is not None and is_frozen(file):
            msg = f"{self.name} with the pre-processor's {self._transform} is exported for one size: give input_size"
            raise ValueError(msg)
        return file

    def _refuse_any_size(self) -> None:
        # Padding by the image's size is a rounded fraction of a rounded one at each layer: torch's exporter never ends.
        if self.takes_any_size and not any(isinstance(module, PADDED_BY_SIZE) for module in self.model.modules()):
            return
        resizing = "without a pre-processor"
        if self._transform is not None:
            resizing = f"whose pre-processor, {self._transform}, gives images of many sizes,"
        msg = (
            f"{self.name} {resizing} is exported for one size of image: give input_size, the height and width of the "
            "images that the exported model will see"
        )
        raise ValueError(msg)

    @contextmanager
    def _exportable(self, input_size: tuple[int, int] | None) -> Iterator[None]:
        """Swap what an exported graph computes in another way, for the duration."""
        with ExitStack() as stack:
            stack.enter_context(exportable(self.model))
            if isinstance(self.pre_processor, PreProcessor):
                stack.callback(setattr, self.pre_processor, "export_transform", self.pre_processor.export_transform)
                self.pre_processor.export_transform = exportable_transform(self._transform, input_size)
            yield

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

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: Any = None,  # noqa: ARG002
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root: Folder to export into.
            model_file_name: Name of the files, without their ending.
            input_size: Height and width of images; left out, as for :meth:`to_onnx`.
            compression_type: FP16, INT8 (weights alone), INT8_PTQ or INT8_ACQ; left out, weights stay FP32.
            datamodule: Images for INT8_PTQ and INT8_ACQ: training images to calibrate with, and for INT8_ACQ validation
                images to measure on.
            metric: What INT8_ACQ keeps up, a metric of anomalib's; left out, F1 of images.
            task: Not used.
            max_drop: How much the metric may lose by INT8_ACQ, in [0, 1].
            ov_kwargs: Passed on to :func:`openvino.convert_model`; an ``extension`` comes beside the package's own.
            onnx_kwargs: Passed on to :func:`torch.onnx.export`.

        Returns:
            The .xml file.

        Raises:
            ValueError: If INT8_PTQ or INT8_ACQ has no images, or the model no thresholds.
        """
        if find_spec("openvino") is not None:  # or anomalib says that it is missing
            given = (ov_kwargs or {}).get("extension") or []
            extensions = [decide_constant_choices(), *(given if isinstance(given, list) else [given])]
            ov_kwargs = {**(ov_kwargs or {}), "extension": extensions}
        arguments: dict[str, Any] = {"input_size": input_size, "ov_kwargs": ov_kwargs, "onnx_kwargs": onnx_kwargs}
        if compression_type is None:
            return mark_as_own(super().to_openvino(export_root, model_file_name, **arguments))
        compression_type = CompressionType(compression_type)  # a program may give its value
        check_compression(compression_type, datamodule, max_drop)
        with TemporaryDirectory() as folder:
            file = super().to_openvino(folder, model_file_name, **arguments)
            target = Path(export_root) / "weights" / ExportType.OPENVINO.value / file.name
            compress_file(file, target, compression_type, datamodule, metric, max_drop)
        return mark_as_own(target)

    @staticmethod
    def _post_training_quantization_ov(model: "Model", datamodule: AnomalibDataModule | None = None) -> "Model":
        return compress(model, CompressionType.INT8_PTQ, datamodule)
