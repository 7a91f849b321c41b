# SPDX-License-Identifier: Apache-2.0
"""Training on tiles of large images, and keeping the tiler in checkpoints."""

from typing import TYPE_CHECKING, Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.components import AnomalibModule
from torch import Tensor

from .tiling import make_tiler, tiler_settings

# anomalib lists only the direct subclasses of AnomalibModule, so what models share has to come from beside it.
if TYPE_CHECKING:
    _Base = AnomalibModule
else:
    _Base = object


class TiledModule(_Base):
    """A module whose network may have a tiler, which anomalib's TilerConfigurationCallback sets."""

    _loaded_tiler: Tiler | None = None

    @property
    def _tiler(self) -> Tiler | None:
        return cast("Tiler | None", self.model.tiler)

    def training_images(self, batch: ImageBatch) -> Tensor:
        """The images of a batch, or with a tiler random tiles of them.

        Args:
            batch: Images (B, 3, H, W); values that a resize let overstep [0, 1] are clamped.

        Returns:
            (B, 3, H, W), or (4B, 3, h, w) with a tiler, values in [0, 1].
        """
        return self.training_views(batch)[0]

    def training_views(self, batch: ImageBatch) -> tuple[Tensor, Tensor | None]:
        """What :meth:`training_images` gives, gray outside a region of interest, and where it is inside.

        Args:
            batch: As for :meth:`training_images`.

        Returns:
            The images, and (B, 1, H, W) or (4B, 1, h, w), true inside; nothing where there is no region.
        """
        images = cast("Tensor", batch.image).clamp(0, 1)
        region = getattr(self.model, "region", None)
        if region is not None:
            images = region.hide(images)
            images = torch.cat([images, region.inside.to(images.dtype).expand(len(images), -1, -1, -1)], dim=1)
        if self._tiler is not None:
            images = self._tiler.tile(images, use_random_tiling=True)
        return (images, None) if region is None else (images[:, :-1].contiguous(), images[:, -1:] > 0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the tiler's settings beside the weights."""
        super().on_save_checkpoint(checkpoint)
        if self._tiler is not None:
            checkpoint["tiler"] = tiler_settings(self._tiler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's tiler if none is given."""
        super().on_load_checkpoint(checkpoint)
        if self._tiler is None or self._tiler is self._loaded_tiler:
            self._loaded_tiler = make_tiler(**checkpoint["tiler"]) if "tiler" in checkpoint else None
            self.model.tiler = self._loaded_tiler  # type: ignore[assignment]
