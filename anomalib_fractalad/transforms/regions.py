# SPDX-License-Identifier: Apache-2.0
"""Anomalies in random regions of an image: pasted, warped, erased, recolored, turned, scratched."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool1d, avg_pool2d, grid_sample, interpolate, pad
from torchvision.transforms import v2

from .foreground import foreground_mask

COARSE = 32  # cells along each side of the grid that a region's center is drawn from
PRECISION = 2**20  # parts that a cell's share of foreground is counted in
OUTLINE = 9  # values along each side of the noise that frays a region's outline
BLURS = (9, 15, 25, 41)  # pixels


class RegionAnomalyGenerator(v2.Transform, ABC):  # type: ignore[misc]  # torchvision is untyped
    """Change an image in a region of random shape, which lies on the foreground.

    All random numbers of a batch are drawn by :meth:`generate_parameters`; :meth:`apply` has no randomness of its own.

    Args:
        size: Range of the region's side, as a share of the image's shorter side; drawn evenly on a logarithmic scale.
            This and the next two are ``SIZE``, ``SOFTNESS`` and ``OPACITY`` of the kind of anomaly where left out.
        softness: Range of the width in pixels of the region's soft edge.
        opacity: Range of how much of the change is blended in.

    Raises:
        ValueError: If a range is not ascending, or outside (0, 1] for ``size`` and ``opacity``.
    """

    SIZE: tuple[float, float] = (0.04, 0.5)
    SOFTNESS: tuple[float, float] = (0.3, 2.0)
    OPACITY: tuple[float, float] = (0.6, 1.0)

    def __init__(
        self,
        size: tuple[float, float] | None = None,
        softness: tuple[float, float] | None = None,
        opacity: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.size = self.SIZE if size is None else size
        self.softness = self.SOFTNESS if softness is None else softness
        self.opacity = self.OPACITY if opacity is None else opacity
        for name, most in {"size": 1.0, "softness": math.inf, "opacity": 1.0}.items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                msg = f"{name}={(low, high)}: two ascending values above 0 and at most {most:g} are needed."
                raise ValueError(msg)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Make anomalies, without waiting for an accelerator.

        Args:
            images: Batch ``(B, C, H, W)``, floating point, values in [0, 1].

        Returns:
            Anomalous images ``(B, C, H, W)``, values in [0, 1], and masks ``(B, 1, H, W)``, 1 where the change shows.
        """
        return self.apply(images, self.generate_parameters(images))

    def generate_parameters(self, images: Tensor) -> dict[str, Tensor]:
        """Draw all random numbers for a batch.

        Args:
            images: Images ``(B, C, H, W)``; their content, too, decides where regions lie.

        Returns:
            Tensors with one row for each image: ``center`` (row and column in pixels, on the images' device), and on
            the CPU ``axes`` (half axes in pixels), ``angle`` (radians), ``box`` (whether it is a box and no ellipse),
            ``outline`` (noise), ``softness`` (pixels), ``opacity``, and what the kind of anomaly needs besides.
        """
        count, height, width = len(images), *images.shape[-2:]
        side = min(height, width) * torch.exp(_uniform([math.log(value) for value in self.size], count))
        aspect = torch.exp(_uniform((-1.1, 1.1), count))
        axes = torch.stack([side * aspect.sqrt(), side / aspect.sqrt()], dim=1).clamp(min=4) / 2
        return {
            "center": _draw_centers(images),
            "axes": axes,
            "angle": _uniform((0, math.pi), count),
            "box": torch.rand(count) < 0.5,
            "outline": torch.randn(count, 1, OUTLINE, OUTLINE),
            "softness": _uniform(self.softness, count),
            "opacity": _uniform(self.opacity, count),
            **self.generate_change(images),
        }

    @abstractmethod
    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw the random numbers that only this kind of anomaly needs."""

    def apply(self, images: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the anomalies that the parameters describe.

        Args:
            images: Images ``(B, C, H, W)``.
            parameters: What :meth:`generate_parameters` returned for images of this number and shape.

        Returns:
            Anomalous images ``(B, C, H, W)`` and masks ``(B, 1, H, W)``.
        """
        parameters = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}
        region = self.region(images, parameters) * parameters["opacity"].view(-1, 1, 1, 1)
        anomalous = self.change(images, region.to(images.dtype), parameters).clamp(0, 1)
        return anomalous, visible_change(images, anomalous)

    def region(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Draw the regions, ``(B, 1, H, W)``, values in [0, 1]."""
        x, y = _turned_places(images, parameters)
        across, along = parameters["axes"][:, :1, None], parameters["axes"][:, 1:, None]
        u, v = (x / across).abs(), (y / along).abs()
        distance = torch.where(parameters["box"][:, None, None], torch.maximum(u, v), torch.hypot(u, v))
        outline = interpolate(parameters["outline"], images.shape[-2:], mode="bicubic").squeeze(1)
        depth = (1 - distance - 0.25 * outline) * torch.minimum(across, along)
        return (4 * depth / parameters["softness"][:, None, None]).sigmoid().unsqueeze(1)

    @abstractmethod
    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Change images ``(B, C, H, W)`` where the region ``(B, 1, H, W)`` is above 0."""


class CutPasteAnomalyGenerator(RegionAnomalyGenerator):
    """Paste a turned, scaled and shifted part of another image of the batch, or of the image itself."""

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw where the pasted part comes from."""
        count = len(images)
        own = torch.arange(count)
        angle, scale = _uniform((-math.pi / 2, math.pi / 2), count), torch.exp(_uniform((-0.5, 0.5), count))
        cos, sin = scale * angle.cos(), scale * angle.sin()
        shift = _uniform((-0.6, 0.6), count, 2)
        return {
            "source": torch.where(torch.rand(count) < 0.7, torch.randperm(count), own),
            "affine": torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3),
            "brightness": _uniform((0.85, 1.15), count),
        }

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Blend the part in."""
        grid = affine_grid(parameters["affine"].to(images.dtype), list(images.shape), align_corners=False)
        part = grid_sample(images[parameters["source"]], grid, padding_mode="reflection", align_corners=False)
        part = (part * parameters["brightness"].to(images.dtype).view(-1, 1, 1, 1)).clamp(0, 1)
        return torch.lerp(images, part, region)


class WarpAnomalyGenerator(RegionAnomalyGenerator):
    """Bend and shift what lies in the region."""

    SIZE = (0.06, 0.5)
    SOFTNESS = (4.0, 12.0)

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw the displacement, in halves of the image's sides."""
        count = len(images)
        bend = torch.randn(count, 2, 5, 5) * _uniform((0.03, 0.12), count).view(-1, 1, 1, 1)
        return {"displacement": bend + 0.06 * torch.randn(count, 2, 1, 1)}

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Sample the image where the displacement points to."""
        displacement = interpolate(parameters["displacement"].to(images.dtype), images.shape[-2:], mode="bicubic")
        identity = torch.eye(2, 3, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
        grid = affine_grid(identity, list(images.shape), align_corners=False)
        grid = grid + (displacement * region).permute(0, 2, 3, 1)
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class EraseAnomalyGenerator(RegionAnomalyGenerator):
    """Blur the region away, or fill it with one color of the image."""

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw how each region is erased."""
        count, height, width = len(images), *images.shape[-2:]
        return {
            "blur": torch.where(torch.rand(count) < 0.5, torch.tensor(BLURS)[torch.randint(len(BLURS), (count,))], 0),
            "pixel": (torch.rand(count, 2) * torch.tensor([height, width])).long(),
            "grain": 0.01 * torch.randn(count, 1, height, width),
        }

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Blend the blurred image or the color in."""
        row, column = parameters["pixel"].T
        color = images[torch.arange(len(images), device=images.device), :, row, column][..., None, None]
        content = color + parameters["grain"].to(images.dtype)
        for side in BLURS:
            content = torch.where(parameters["blur"].view(-1, 1, 1, 1) == side, _blur(images, side), content)
        return torch.lerp(images, content, region)


class RecolorAnomalyGenerator(RegionAnomalyGenerator):
    """Change contrast, brightness and hue of the region, at times of the whole foreground."""

    SIZE = (0.05, 0.9)
    SOFTNESS = (1.0, 6.0)
    OPACITY = (1.0, 1.0)

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw gains and offsets."""
        count, channels = images.shape[:2]
        offset = 0.08 * torch.randn(count, 1, 1, 1) + 0.06 * torch.randn(count, channels, 1, 1)
        return {
            "gain": torch.exp(0.25 * torch.randn(count, channels, 1, 1)),
            "offset": offset,
            "everywhere": torch.rand(count) < 0.3,
        }

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Blend the recolored image in."""
        everywhere = parameters["everywhere"].view(-1, 1, 1, 1)
        region = torch.where(everywhere, foreground_mask(images).to(images.dtype), region)
        recolored = images * parameters["gain"].to(images.dtype) + parameters["offset"].to(images.dtype)
        return torch.lerp(images, recolored, region)


class SwirlAnomalyGenerator(RegionAnomalyGenerator):
    """Turn what lies in the region, most at its center."""

    SIZE = (0.15, 0.6)
    SOFTNESS = (12.0, 30.0)

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw the angle in radians at the center."""
        sign = torch.where(torch.rand(len(images)) < 0.5, -1.0, 1.0)
        return {"turn": sign * _uniform((0.8, 2.5), len(images))}

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Sample the image where the turned place was."""
        height, width = images.shape[-2:]
        row, column = parameters["center"].to(images.dtype)[..., None, None].unbind(1)
        y = torch.arange(height, device=images.device).view(-1, 1) + 0.5 - row
        x = torch.arange(width, device=images.device) + 0.5 - column
        angle = region.squeeze(1) * parameters["turn"].to(images.dtype)[:, None, None]
        turned_y, turned_x = y * angle.cos() - x * angle.sin() + row, y * angle.sin() + x * angle.cos() + column
        grid = torch.stack([2 * turned_x / width - 1, 2 * turned_y / height - 1], dim=-1)
        return grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class ScratchAnomalyGenerator(RegionAnomalyGenerator):
    """Draw a thin wavy line, brighter or darker than what it crosses.

    Args:
        size: Range of the line's length, as a share of the image's shorter side.
        softness: Range of the width in pixels of the line's soft edge.
        opacity: Range of the change in brightness.
    """

    SIZE = (0.1, 0.6)
    SOFTNESS = (0.5, 1.5)
    OPACITY = (0.1, 0.5)

    def generate_change(self, images: Tensor) -> dict[str, Tensor]:
        """Draw the width in pixels, the waves, and whether the line is bright."""
        count = len(images)
        return {
            "width": _uniform((0.5, 2.0), count),
            "waves": torch.stack(
                [_uniform((0, 6), count), _uniform((1, 4), count), _uniform((0, 2 * math.pi), count)], dim=1
            ),
            "sign": torch.where(torch.rand(count) < 0.5, -1.0, 1.0),
        }

    def region(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Draw the lines, ``(B, 1, H, W)``, values in [0, 1]."""
        along, across = _turned_places(images, parameters)
        half = parameters["axes"].amax(dim=1)[:, None, None]
        height_of_waves, number, phase = parameters["waves"][..., None, None].unbind(1)
        away = (across - height_of_waves * (math.pi * number * along / half + phase).sin()).abs()
        softness = parameters["softness"][:, None, None]
        line = (4 * (parameters["width"][:, None, None] - away) / softness).sigmoid()
        return (line * (4 * (half - along.abs()) / softness).sigmoid()).unsqueeze(1)

    def change(self, images: Tensor, region: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Brighten or darken the line."""
        return images + region * parameters["sign"].to(images.dtype).view(-1, 1, 1, 1)


def visible_change(images: Tensor, anomalous: Tensor, threshold: float = 0.02) -> Tensor:
    """Mask of what a change shows in.

    Args:
        images: Images ``(B, C, H, W)``, values in [0, 1].
        anomalous: Changed images of the same shape.
        threshold: Mean absolute difference, over channels and 3x3 pixels, that counts as a change.

    Returns:
        ``(B, 1, H, W)``, 1 where the change shows and 0 elsewhere, in the images' data type.
    """
    difference = (anomalous - images).abs().mean(dim=1, keepdim=True)
    return (avg_pool2d(difference, 3, stride=1, padding=1) > threshold).to(images.dtype)


def _draw_centers(images: Tensor) -> Tensor:
    """Draw a pixel of the foreground in each image, (B, 2), row and column."""
    height, width = images.shape[-2:]
    rows, columns = min(COARSE, height), min(COARSE, width)
    share = interpolate(foreground_mask(images).float(), (rows, columns), mode="area").flatten(1)
    drawn = torch.rand(len(images), 3).to(images.device, non_blocking=True)
    # Whole numbers, whose sums are the same on every device and at every call.
    cumulative = (share * PRECISION).round().long().cumsum(dim=1)
    count = cumulative[:, -1:]
    wanted = (drawn[:, :1] * count).long().clamp(max=count - 1)
    cell = torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
    row, column = cell // columns + drawn[:, 1], cell % columns + drawn[:, 2]
    return torch.stack([row * height / rows, column * width / columns], dim=1)


def _turned_places(images: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where pixels lie in a region's own axes, in pixels from its center: along the first one and the second."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device).view(1, -1, 1) - parameters["center"][:, :1, None]
    x = torch.arange(width, device=images.device).view(1, 1, -1) - parameters["center"][:, 1:, None]
    cos, sin = parameters["angle"].cos()[:, None, None], parameters["angle"].sin()[:, None, None]
    return x * cos + y * sin, y * cos - x * sin


def _blur(images: Tensor, side: int) -> Tensor:
    """Two box filters after another, close to a Gaussian, as one product along each axis."""
    side = min(side, *images.shape[-2:])
    side -= 1 - side % 2
    rows, columns = (_box_twice(length, side, images) for length in images.shape[-2:])
    return (rows @ images @ columns.mT).to(images.dtype)


def _box_twice(length: int, side: int, like: Tensor) -> Tensor:
    """What two box filters with mirrored borders make of a line of pixels, (length, length), like another tensor."""
    padded = pad(torch.eye(length, device=like.device).unsqueeze(0), (side // 2,) * 2, mode="reflect")
    once = avg_pool1d(padded, side, stride=1).squeeze(0).T
    return (once @ once).to(like.dtype)


def _uniform(interval: Sequence[float], *shape: int) -> Tensor:
    low, high = interval
    return low + (high - low) * torch.rand(shape)
