# SPDX-License-Identifier: Apache-2.0
"""The student of ADPS, which sees an image in patches."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from anomalib_fractalad.models.components import Backbone


class PatchStudent(Backbone):
    """A backbone with random weights that sees an image's patches one by one.

    Args:
        name: Name of a timm model.
        layers: The levels, from the finest to the coarsest.
        patches: Patches along each side of the image.
        split_layers: Those of ``layers`` after which features are split 2 x 2 once more.

    Attributes:
        size_multiple: What an image's height and width have to be multiples of.

    Raises:
        ValueError: If levels are out of order, or ``split_layers`` are not among ``layers`` or name the last.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int | str],
        patches: int,
        split_layers: Sequence[int | str] = (),
    ) -> None:
        super().__init__(name, layers, pre_trained=False)
        if any(finer >= coarser for finer, coarser in pairwise(self.strides)):
            msg = f"layers {list(layers)} have strides {self.strides}; name one layer of each stride, the finest first"
            raise ValueError(msg)
        if wrong := [layer for layer in split_layers if layer not in layers[:-1]]:
            msg = f"split_layers has {wrong}; it takes those of layers {list(layers)} that have another behind them"
            raise ValueError(msg)
        self.patches = patches
        grids = [patches]
        self.grids: list[list[int]] = []
        for layer, level in zip(layers, self.levels, strict=True):
            if layer in split_layers:
                grids = [*grids, 2]
                _find_module(self.features, level).register_forward_hook(_split_output)
            self.grids.append(grids)
        self.size_multiple: int = self.strides[-1] * patches * 2 ** len(set(split_layers))

    def check_size(self, size: Sequence[int], what: Literal["image", "tile"] = "image") -> None:
        """Refuse a size that cannot be divided into patches.

        Args:
            size: Height and width of what the student sees.
            what: What that is.

        Raises:
            ValueError: If they are not multiples of ``size_multiple``.
        """
        multiple = self.size_multiple
        if any(side % multiple for side in size):
            smaller = "x".join(str(max(side // multiple, 1) * multiple) for side in size)
            larger = "x".join(str(-(-side // multiple) * multiple) for side in size)
            nearest = " or ".join(dict.fromkeys((smaller, larger)))
            fix = f"Take tiles of {nearest}" if what == "tile" else f"Resize to {nearest} in the pre-processor"
            msg = (
                f"{'an' if what == 'image' else 'a'} {what} of {size[0]}x{size[1]} (height x width) cannot be divided "
                f"into {self.patches} x {self.patches} patches (patches={self.patches}): its sides must be multiples "
                f"of {multiple}, patches times the stride of the coarsest features. {fix}, or choose fewer patches."
            )
            raise ValueError(msg)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Extract the features of all patches as one batch and put them back in their places.

        Args:
            images: (B, 3, H, W), values in [0, 1].

        Returns:
            (B, C_i, H_i, W_i) for each level.
        """
        features = super().forward(to_patches(images, self.patches))
        for i, grids in enumerate(self.grids):
            for grid in reversed(grids):
                features[i] = from_patches(features[i], grid)
        return features


def to_patches(images: Tensor, grid: int) -> Tensor:
    """Cut images into ``grid`` x ``grid`` patches, row by row.

    Args:
        images: (B, C, H, W).
        grid: Patches along each side, a divisor of H and W.

    Returns:
        (B x grid x grid, C, H / grid, W / grid).
    """
    return rearrange(images, "b c (rows h) (columns w) -> (b rows columns) c h w", rows=grid, columns=grid)


def from_patches(patches: Tensor, grid: int) -> Tensor:
    """Put patches back together; the reverse of :func:`to_patches`.

    Args:
        patches: (B x grid x grid, C, h, w).
        grid: Patches along each side.

    Returns:
        (B, C, grid x h, grid x w).
    """
    return rearrange(patches, "(b rows columns) c h w -> b c (rows h) (columns w)", rows=grid, columns=grid)


def _split_output(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return to_patches(output, 2)


def _find_module(features: nn.Module, level: str) -> nn.Module:
    """The module of a feature level, whose name timm may have flattened."""
    flat = level.replace(".", "_")
    return features.get_submodule(flat if flat in dict(features.named_children()) else level)
