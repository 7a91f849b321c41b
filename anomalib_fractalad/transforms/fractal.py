# SPDX-License-Identifier: Apache-2.0
"""Fractal anomaly generation (Xia et al., FractalAD, arXiv 2301.12739)."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale

from .foreground import object_mask, shorter_side
from .ifs import draw, sample_systems

MIN_IMAGE_SIZE = 32
# A stamp is 3 pixels wide.
MIN_PATCH_SIZE = 3
# Resizing leaves values this far outside [0, 1].
ROUNDING = 1e-3

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
SLIGHT_JITTER, STRONG_JITTER, CHANNEL_GAIN = range(3)


class FractalAnomalyGenerator(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Paste fractal-shaped, recolored, flipped and rotated patches of an image into the same image.

    Takes the place of anomalib's ``PerlinAnomalyGenerator``: images in, anomalous images and masks out. All random
    numbers of a batch are drawn by :meth:`generate_parameters`; :meth:`apply` has no randomness of its own. The
    defaults are the published ones.

    Grey images keep one channel: saturation and hue have nothing to act on, and one channel gain is applied, not two.

    Args:
        patch_size: Range of the patch's side, as a share of the image's shorter side.
        position_margin: Share of height and width, at each border, that no patch is taken from or pasted to.
        color_probabilities: Probabilities of the three recolorings: slight jitter, strong jitter, channel gain.
        slight_jitter: Strength of the slight jitter of brightness, contrast, saturation and hue, at most 0.5.
        strong_jitter: Strength of the strong jitter of brightness and contrast, at most 1.
        channel_gain: Range of the gains of two channels, which are drawn with replacement.
        wrap: Let values that a channel gain brings above 255 start at 0 again, as the published 8-bit code does;
            otherwise they are clipped.
        flip_probability: Probability of a left-right flip, and of a top-bottom flip.
        rotation: Range of the counterclockwise rotation in degrees.
        maps: Number of maps of the iterated function systems.
        points: Number of points that an attractor is drawn with.
        dilations: Number of times that the pasted shape is dilated with 3x3 pixels to give the mask.
        noise_probability: Probability of Gaussian noise inside the mask.
        noise_amplitude: Standard deviation of the noise, the same in all channels.
        jitter: Strength of the jitter that :meth:`augment` applies to both normal and anomalous image, at most 0.5.
        object_mode: Take patches from, and paste them to, the object on a plain background (see
            :func:`~anomalib_fractalad.transforms.foreground.object_mask`). Where no object is found, or none that a
            patch fits, the plain mode is used for that image.
        object_patch_size: Range of the patch's side in object mode, as a share of the object's shorter side. It never
            exceeds the image's shorter side.
        probability: Probability that an image gets an anomaly; the others are returned as they are, with empty masks.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        patch_size: tuple[float, float] = (0.1, 0.5),
        position_margin: float = 0.1,
        color_probabilities: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
        slight_jitter: float = 0.2,
        strong_jitter: float = 1.0,
        channel_gain: tuple[float, float] = (0.0, 2.0),
        wrap: bool = True,
        flip_probability: float = 0.5,
        rotation: tuple[float, float] = (15.0, 75.0),
        maps: int = 2,
        points: int = 100_000,
        dilations: int = 3,
        noise_probability: float = 0.5,
        noise_amplitude: float = 10 / 255,
        jitter: float = 0.05,
        object_mode: bool = False,
        object_patch_size: tuple[float, float] = (0.05, 1.5),
        probability: float = 1.0,
    ) -> None:
        super().__init__()
        _check_interval("patch_size", patch_size, 0, 1)
        _check_margin(position_margin, patch_size)
        if len(color_probabilities) != 3 or not math.isclose(sum(color_probabilities), 1, abs_tol=1e-6):
            msg = f"color_probabilities={color_probabilities}: three probabilities that sum to 1 are needed."
            raise ValueError(msg)
        for color_probability in color_probabilities:
            _check_range("color_probabilities", color_probability, 0, 1)
        _check_range("slight_jitter", slight_jitter, 0, 0.5)
        _check_range("strong_jitter", strong_jitter, 0, 1)
        _check_interval("channel_gain", channel_gain, 0, math.inf)
        _check_range("flip_probability", flip_probability, 0, 1)
        _check_interval("rotation", rotation, -360, 360)
        _check_count("maps", maps, 2)
        _check_count("points", points, 1)
        _check_count("dilations", dilations, 0)
        _check_range("noise_probability", noise_probability, 0, 1)
        _check_range("noise_amplitude", noise_amplitude, 0, 1)
        _check_range("jitter", jitter, 0, 0.5)
        _check_interval("object_patch_size", object_patch_size, 0, math.inf)
        _check_range("probability", probability, 0, 1)
        self.patch_size = patch_size
        self.position_margin = position_margin
        self.color_probabilities = color_probabilities
        self.slight_jitter = slight_jitter
        self.strong_jitter = strong_jitter
        self.channel_gain = channel_gain
        self.wrap = wrap
        self.flip_probability = flip_probability
        self.rotation = rotation
        self.maps = maps
        self.points = points
        self.dilations = dilations
        self.noise_probability = noise_probability
        self.noise_amplitude = noise_amplitude
        self.jitter = jitter
        self.object_mode = object_mode
        self.object_patch_size = object_patch_size
        self.probability = probability

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Make anomalies.

        Args:
            image: Image ``(C, H, W)`` or batch ``(B, C, H, W)`` with 1 or 3 channels, each side at least 32 pixels,
                floating point, values in [0, 1].

        Returns:
            Anomalous images of the same shape, values in [0, 1], and their masks ``(1, H, W)`` or ``(B, 1, H, W)`` in
            the same data type, 1 where the anomaly is. Outside the masks nothing changes.

        Raises:
            TypeError: If ``image`` is a mask or is not of a floating-point type.
            ValueError: If shape or values are not as described.
        """
        images = _checked_batch(image)
        with _full_precision(images):
            anomalous, masks = self.apply(images, self.generate_parameters(images))
        return (anomalous, masks) if image.ndim == 4 else (anomalous[0], masks[0])

    @torch.no_grad()
    def augment(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make anomalies, and give normal and anomalous images the same slight jitter, as the published training does.

        Args:
            image: As in :meth:`forward`.

        Returns:
            Normal images, anomalous images and masks. Normal and anomalous images are equal outside the masks.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`.
        """
        images = _checked_batch(image)
        with _full_precision(images):
            parameters = self.generate_parameters(images)
            anomalous, masks = self.apply(images, parameters)
            normal, anomalous = self._jitter_alike(images, anomalous, masks, parameters)
        return (normal, anomalous, masks) if image.ndim == 4 else (normal[0], anomalous[0], masks[0])

    def generate_parameters(self, images: Tensor) -> dict[str, Tensor]:
        """Draw all random numbers for a batch.

        Args:
            images: Images ``(B, C, H, W)``. Their size and device count; in object mode their content, too.

        Returns:
            Tensors with one row for each image: ``active`` (whether it gets an anomaly), ``side``, ``source`` and
            ``target`` (patch side and top left corners in pixels), ``color`` (which recoloring), ``factors``
            (brightness, contrast, saturation, hue in turns), ``channels`` and ``gains``, ``flip`` (top-bottom and
            left-right), ``angle`` (degrees), ``systems``, ``stamps``, ``noisy`` (whether noise is added) and ``jitter``
            (like ``factors``). Besides, ``order``, in which brightness, contrast, saturation and hue are changed
            throughout the batch, and ``noise`` of the noisy images, from the top left corner of the dilated patch. All
            are on the CPU but ``noise``, which is on the images' device.
        """
        batch, channels = images.shape[:2]
        side, source, target = self._place(images)
        color = torch.multinomial(torch.tensor(self.color_probabilities), batch, replacement=True)
        strength = torch.tensor([[self.slight_jitter] * 4, [self.strong_jitter] * 2 + [0.0] * 2, [0.0] * 4])
        stamps = torch.randint(2, (batch, 3, 3), dtype=torch.bool)
        # A pattern without a pixel would make an empty mask.
        stamps[:, 1, 1] |= ~stamps.flatten(1).any(1)
        reach = int(side.max()) + 2 * self.dilations
        noisy = torch.rand(batch) < self.noise_probability
        noise = self.noise_amplitude * torch.randn(int(noisy.sum()), reach, reach, device=images.device)
        return {
            "active": torch.rand(batch) < self.probability,
            "side": side,
            "source": source,
            "target": target,
            "color": color,
            "factors": _sample_jitter(strength[color]),
            "order": torch.randperm(4),
            "channels": torch.randint(channels, (batch, 2)),
            "gains": _uniform(self.channel_gain, batch, 2),
            "flip": torch.rand(batch, 2) < self.flip_probability,
            "angle": _uniform(self.rotation, batch),
            "systems": sample_systems(batch, self.maps),
            "stamps": stamps,
            "noisy": noisy,
            "noise": noise,
            "jitter": _sample_jitter(torch.full((batch, 4), float(self.jitter))),
        }

    def _place(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw patch sides ``(B,)`` and corners ``(B, 2)`` of where patches come from and go to."""
        batch, _, *size = images.shape
        side = (_uniform(self.patch_size, batch) * min(size)).long().clamp(min=MIN_PATCH_SIZE)
        shares = torch.rand(2, batch, 2)
        start = self.position_margin * torch.tensor(size)
        room = (1 - 2 * self.position_margin) * torch.tensor(size) - side[:, None]
        corners = (start + shares * room.clamp(min=0)).long()
        if not self.object_mode:
            return side, *corners
        masks = object_mask(images)
        object_side = _uniform(self.object_patch_size, batch) * shorter_side(masks).cpu()
        object_side = object_side.long().clamp(MIN_PATCH_SIZE, min(size))
        centers, found = _sample_centers(masks.squeeze(1), object_side, shares[..., 0])
        side = torch.where(found, object_side, side)
        corners = torch.where(found[:, None], centers - object_side[:, None] // 2, corners)
        return side, *corners

    def apply(self, images: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the anomalies that the parameters describe.

        Args:
            images: Images ``(B, C, H, W)``.
            parameters: What :meth:`generate_parameters` returned for images of this number, shape and device.

        Returns:
            Anomalous images ``(B, C, H, W)`` and masks ``(B, 1, H, W)``.
        """
        side, order = parameters["side"], parameters["order"].tolist()
        parameters = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}
        size = images.shape[-2:]
        images = images.contiguous()
        # More points than the largest patch has pixels would change little.
        points = min(self.points, int(side.max()) ** 2)
        shape = draw(parameters["systems"], side, parameters["stamps"], points)
        shape = shape & parameters["active"][:, None, None]
        opaque, original_row, original_column = _rotate(shape, parameters)

        # Only the pixels that change are touched: a list (C, N) out of all images.
        index, image, row, column = _list_pixels(opaque)
        target = _position(parameters["target"], image, row, column, size)
        row, column = (original.flatten().index_select(0, index).long() for original in (original_row, original_column))
        source = _position(parameters["source"], image, row, column, size)
        values = self._recolor(_read(images, image, source), image, parameters, order)
        anomalous = images.clone()
        _write(anomalous, image, target, values)

        corner = parameters["target"] - self.dilations
        dilated = _crop(_dilate(opaque, self.dilations), corner, size)
        _, image, row, column = _list_pixels(dilated)
        masks = torch.zeros_like(anomalous[:, :1])
        _write(masks, image, _position(corner, image, row, column, size), masks.new_ones(1, len(image)))

        noisy = parameters["noisy"].nonzero().squeeze(1)
        index, number, row, column = _list_pixels(dilated.index_select(0, noisy))
        image = noisy.index_select(0, number)
        target = _position(corner, image, row, column, size)
        values = _read(anomalous, image, target) + parameters["noise"].flatten().index_select(0, index)
        _write(anomalous, image, target, values.clamp_(0, 1))
        return anomalous, masks

    def _recolor(self, values: Tensor, image: Tensor, parameters: dict[str, Tensor], order: list[int]) -> Tensor:
        """Recolor pixels ``(C, N)`` of the images ``(N,)``."""
        color = parameters["color"].index_select(0, image)
        for kind, changed in ((SLIGHT_JITTER, range(4)), (STRONG_JITTER, (BRIGHTNESS, CONTRAST)), (CHANNEL_GAIN, ())):
            chosen = (color == kind).nonzero().squeeze(1)
            old, of = values.index_select(1, chosen), image.index_select(0, chosen)
            if kind == CHANNEL_GAIN:
                new = self._amplify(old, of, parameters)
            else:
                new = _jitter_list(old, of, parameters["factors"].T, [change for change in order if change in changed])
            values.index_copy_(1, chosen, new)
        return values

    def _amplify(self, values: Tensor, image: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        channels = torch.arange(len(values), device=values.device)
        for draw_number in range(min(2, len(values))):
            chosen = parameters["channels"][:, draw_number] == channels[:, None]
            gains = torch.where(chosen, parameters["gains"][:, draw_number], 1)
            values = values * gains.index_select(1, image)
            if self.wrap:
                values = (values * 255).remainder_(256).div_(255)
            values = values.clamp(max=1)
        return values

    def _jitter_alike(
        self,
        images: Tensor,
        anomalous: Tensor,
        masks: Tensor,
        parameters: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Jitter the normal images; of the anomalous ones jitter what is under the masks, and copy the rest."""
        dtype, images = images.dtype, images if images.dtype == torch.float64 else images.float()
        factors = parameters["jitter"].to(images).T[..., None, None, None]
        order = parameters["order"].tolist()
        means = []

        def mean_of_image(gray: Tensor) -> Tensor:
            means.append(gray.mean(dim=(-2, -1), keepdim=True))
            return means[0]

        normal = _jitter(images, factors, order, mean_of_image).to(dtype)
        image, target = masks.flatten(1).nonzero().unbind(1)
        mean = means[0].flatten().index_select(0, image)
        factors = factors.flatten(1).index_select(1, image)[:, None, None]
        values = _jitter(_read(anomalous, image, target)[:, None], factors, order, lambda _: mean)
        anomalous = normal.clone()
        _write(anomalous, image, target, values[:, 0])
        return normal, anomalous


def _full_precision(images: Tensor) -> torch.autocast:
    """Within, autocast is off: positions in half precision would miss their pixels."""
    return torch.autocast(images.device.type, enabled=False)


def _jitter(
    values: Tensor,
    factors: Tensor,
    order: list[int],
    mean_gray: Callable[[Tensor], Tensor],
) -> Tensor:
    """Change brightness, contrast, saturation and hue in the given order.

    Args:
        values: Images ``(..., C, H, W)``.
        factors: Factors ``(4, ...)``, each of which broadcasts against ``values``.
        order: The changes to make.
        mean_gray: Makes the grey level that contrast is changed about from the grey images.
    """
    colored = values.shape[-3] == 3
    for change in order:
        factor = factors[change].to(values.dtype)
        if change == BRIGHTNESS:
            values = (values * factor).clamp_(0, 1)
        elif change == CONTRAST:
            gray = rgb_to_grayscale(values) if colored else values
            values = torch.lerp(mean_gray(gray), values, factor).clamp_(0, 1)
        elif colored and change == SATURATION:
            values = torch.lerp(rgb_to_grayscale(values), values, factor).clamp_(0, 1)
        elif colored and change == HUE:
            values = _shift_hue(values, factor)
    return values


def _shift_hue(values: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images ``(..., 3, H, W)``. Same as kornia's ``adjust_hue``, at a quarter of its time."""
    red, green, blue = values.unbind(-3)
    value = values.amax(-3)
    chroma = value - values.amin(-3)
    sextant = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    sextant = sextant.div_(chroma.clamp(min=torch.finfo(values.dtype).tiny)).add_(6 * turns.squeeze(-3))
    # Each channel lacks a part of the chroma that depends on its own hue's distance on the circle.
    lack = torch.stack([sextant + 5, sextant + 3, sextant + 1], dim=-3).remainder_(6)
    lack = lack.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value.unsqueeze(-3), lack, chroma.unsqueeze(-3), value=-1)


def _jitter_list(values: Tensor, image: Tensor, factors: Tensor, order: list[int]) -> Tensor:
    """Jitter pixels ``(C, N)`` of the images ``(N,)``; contrast is changed about each image's mean over the list."""
    count = image.bincount(minlength=factors.shape[1]).clamp(min=1)

    def mean_gray(gray: Tensor) -> Tensor:
        total = gray.new_zeros(factors.shape[1]).index_add_(0, image, gray.flatten())
        return (total / count).index_select(0, image)

    return _jitter(values[:, None], factors.index_select(1, image)[:, None, None], order, mean_gray)[:, 0]


def _sample_jitter(strength: Tensor) -> Tensor:
    """Sample factors of brightness, contrast, saturation about 1 and a share of a turn of the hue about 0."""
    spread = strength * (2 * torch.rand_like(strength) - 1)
    return spread + torch.tensor([1.0, 1.0, 1.0, 0.0])


def _rotate(shape: Tensor, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Leave of the shape what the flipped and rotated patch does not leave transparent.

    Args:
        shape: Boolean shapes ``(B, S, S)``.
        parameters: See :meth:`FractalAnomalyGenerator.generate_parameters`.

    Returns:
        Boolean shapes ``(B, S, S)``, and row and column ``(B, S, S)`` in the original patch that each pixel comes from.
    """
    center = parameters["side"][:, None, None] / 2
    offset = torch.arange(shape.shape[-1], device=shape.device) + 0.5 - center.squeeze(1)
    y, x = offset[:, :, None], offset[:, None, :]
    angle = parameters["angle"][:, None, None].deg2rad()
    cos, sin = angle.cos(), angle.sin()
    mirror_y, mirror_x = (1.0 - 2.0 * parameters["flip"])[:, :, None, None].unbind(1)
    # Back from the pasted pixel to the original one: against the rotation, then the flips.
    original_y = mirror_y * cos * y + mirror_y * sin * x
    original_x = mirror_x * cos * x - mirror_x * sin * y
    opaque = shape & (torch.maximum(original_y.abs(), original_x.abs()) < center)
    # Where nothing is opaque, the patch's centre is: a mask is never empty.
    middle = parameters["side"] // 2
    lost = parameters["active"] & ~opaque.flatten(1).any(1)
    opaque[torch.arange(len(shape), device=shape.device), middle, middle] |= lost
    return opaque, original_y.add_(center), original_x.add_(center)


def _dilate(shape: Tensor, iterations: int) -> Tensor:
    """Dilate boolean shapes ``(B, S, S)`` with 3x3 pixels; each border grows by one pixel an iteration."""
    # uint8 because torch's bool operations are not vectorised.
    grown = pad(shape.view(torch.uint8), (iterations,) * 4)
    for _ in range(iterations):
        for dim in (1, 2):
            length = grown.shape[dim] - 1
            before, after = grown.narrow(dim, 0, length), grown.narrow(dim, 1, length)
            grown = grown.clone()
            grown.narrow(dim, 1, length).bitwise_or_(before)
            grown.narrow(dim, 0, length).bitwise_or_(after)
    return grown.view(torch.bool)


def _crop(shape: Tensor, corner: Tensor, size: Sequence[int]) -> Tensor:
    """Clear the pixels of shapes ``(B, S, S)``, placed with their corners at ``(B, 2)``, that lie outside an image."""
    cropped = shape.view(torch.uint8)
    for dim in (0, 1):
        position = corner[:, dim, None] + torch.arange(shape.shape[-1], device=shape.device)
        inside = (position >= 0) & (position < size[dim])
        cropped = cropped * inside.unsqueeze(2 - dim).view(torch.uint8)
    return cropped.view(torch.bool)


def _list_pixels(shape: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the pixels that are set in ``(B, S, S)``: flat index, image, row and column, each ``(N,)``."""
    side = shape.shape[-1]
    image, row, column = shape.nonzero().T.contiguous()
    return (image * side + row) * side + column, image, row, column


def _position(corner: Tensor, image: Tensor, row: Tensor, column: Tensor, size: Sequence[int]) -> Tensor:
    """Place pixels ``(N,)`` of patches with corners ``(B, 2)`` in the flattened image."""
    start = corner[:, 0] * size[1] + corner[:, 1]
    return start.index_select(0, image) + row * size[1] + column


def _sample_centers(masks: Tensor, side: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Draw pixels of the masks ``(B, H, W)`` around which squares of the given sides lie inside the image.

    Args:
        masks: Boolean masks ``(B, H, W)``.
        side: Sides ``(B,)`` of the squares.
        shares: Uniform random numbers ``(2, B)``.

    Returns:
        Two pixels ``(2, B, 2)`` for each mask, and whether there are any ``(B,)``.
    """
    height, width = masks.shape[-2:]
    before = side.to(masks.device)[:, None] // 2
    after = side.to(masks.device)[:, None] - before
    rows = torch.arange(height, device=masks.device)
    columns = torch.arange(width, device=masks.device)
    rows_fit = (rows >= before) & (rows <= height - after)
    columns_fit = (columns >= before) & (columns <= width - after)
    cumulative = (masks & rows_fit[:, :, None] & columns_fit[:, None]).flatten(1).cumsum(1)
    count = cumulative[:, -1:]
    wanted = (shares.T.to(masks.device) * count).long().clamp(max=count - 1) + 1
    pixel = torch.searchsorted(cumulative, wanted.contiguous()).clamp(max=height * width - 1).T.cpu()
    return torch.stack([pixel // width, pixel % width], dim=-1), (count > 0).squeeze(1).cpu()


def _flat_index(images: Tensor, image: Tensor, position: Tensor) -> Tensor:
    channels, area = images.shape[1], images.shape[-2:].numel()
    first = image * (channels * area) + position
    return (first + area * torch.arange(channels, device=images.device)[:, None]).flatten()


def _read(images: Tensor, image: Tensor, position: Tensor) -> Tensor:
    """Read pixels ``(C, N)`` of contiguous images, in single precision at least."""
    values = images.view(-1).index_select(0, _flat_index(images, image, position)).view(images.shape[1], -1)
    return values if values.dtype == torch.float64 else values.float()


def _write(images: Tensor, image: Tensor, position: Tensor, values: Tensor) -> None:
    """Write pixels ``(C, N)`` of contiguous images."""
    images.view(-1).scatter_(0, _flat_index(images, image, position), values.to(images.dtype).flatten())


def _uniform(interval: tuple[float, float], *shape: int) -> Tensor:
    low, high = interval
    return low + (high - low) * torch.rand(shape)


def _checked_batch(image: Tensor) -> Tensor:
    """Check an image or a batch and return it as a batch."""
    if isinstance(image, tv_tensors.Mask):
        msg = "A mask was passed: anomalies are made in images."
        raise TypeError(msg)
    if not image.is_floating_point():
        msg = f"Images of dtype {image.dtype}: convert them to floating point with values in [0, 1]."
        raise TypeError(msg)
    if image.ndim not in {3, 4} or image.shape[-3] not in {1, 3} or image.numel() == 0:
        msg = f"Images of shape {tuple(image.shape)}: (C, H, W) or (B, C, H, W) with 1 or 3 channels is needed."
        raise ValueError(msg)
    if min(image.shape[-2:]) < MIN_IMAGE_SIZE:
        height, width = image.shape[-2:]
        msg = f"Images of {height} x {width} pixels: each side needs at least {MIN_IMAGE_SIZE}."
        raise ValueError(msg)
    low, high = torch.stack(image.aminmax()).tolist()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        msg = (
            f"Image values from {low:.3g} to {high:.3g}: anomalies are made before normalisation, with values in "
            "[0, 1]. Leave Normalize out of the pre-processor; the model normalises by itself."
        )
        raise ValueError(msg)
    batch = image.as_subclass(Tensor).reshape(-1, *image.shape[-3:])
    return batch if low >= 0 and high <= 1 else batch.clamp(0, 1)


def _check_margin(margin: float, patch_size: tuple[float, float]) -> None:
    largest = (1 - patch_size[1]) / 2
    if not _is_finite(margin) or not 0 <= margin <= largest + 1e-9:
        msg = (
            f"position_margin={margin!r}: must lie in [0, {largest:g}], so that patches of up to {patch_size[1]:g} of "
            f"the image's shorter side fit between the margins (patch_size={tuple(patch_size)})."
        )
        if _is_finite(margin) and 0 <= margin < 0.5:
            msg += f" For this margin, patch_size must end at {1 - 2 * margin:g} or below."
        raise ValueError(msg)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not _is_finite(value) or not low <= value <= high:
        msg = f"{name}={value!r}: must lie in [{low:g}, {high:g}]."
        raise ValueError(msg)


def _check_interval(name: str, interval: tuple[float, float], low: float, high: float) -> None:
    is_pair = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_is_finite, interval))
    if not is_pair or not low <= interval[0] <= interval[1] <= high:
        msg = f"{name}={interval!r}: two ascending finite values in [{low:g}, {high:g}] are needed."
        raise ValueError(msg)


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        msg = f"{name}={value!r}: must be a whole number of at least {least}."
        raise ValueError(msg)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
