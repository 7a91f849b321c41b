# SPDX-License-Identifier: Apache-2.0
"""Fractal anomaly generation (Xia et al., FractalAD, arXiv 2301.12739)."""

import math

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d
from torchvision.transforms import v2

from .checks import check_count, check_interval, check_margin, check_range, checked_batch
from .color import jitter, jitter_alike, single_precision
from .foreground import object_mask, sample_centers, shorter_side
from .ifs import draw, sample_systems
from .parameters import FractalParameters
from .patches import cut_out, paste

# A stamp is 3 pixels wide.
MIN_PATCH_SIZE = 3

SLIGHT_JITTER, STRONG_JITTER, CHANNEL_GAIN = range(3)


class FractalAnomalyGenerator(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Paste fractal-shaped, recolored, flipped and rotated patches of an image into the same image.

    Takes the place of anomalib's ``PerlinAnomalyGenerator``: images in, anomalous images and masks out. All random
    numbers of a batch are drawn by :meth:`generate_parameters`; :meth:`apply` has no randomness of its own. The
    defaults are the published ones.

    Gray images keep one channel: saturation and hue have nothing to act on, and one channel gain is applied, not two.

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
        self._check_arguments()

    @torch.no_grad()
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Make anomalies.

        Nothing waits for an accelerator, but in object mode. For that reason, values outside [0, 1] raise an error on
        the CPU only; on another device they turn the whole batch into NaN.

        Args:
            image: Image ``(C, H, W)`` or batch ``(B, C, H, W)`` with 1 or 3 channels, each side at least 32 pixels,
                floating point, values in [0, 1].

        Returns:
            Anomalous images of the same shape, values in [0, 1], and their masks ``(1, H, W)`` or ``(B, 1, H, W)`` in
            the same data type, 1 where the anomaly is. Outside the masks nothing changes.

        Raises:
            TypeError: If ``image`` is a mask or is not of a floating-point type.
            ValueError: If the shape is not as described, or, on the CPU, the values.
        """
        images = checked_batch(image)
        with _full_precision(images):
            anomalous, masks = self.apply(images, self.generate_parameters(images))
        return (anomalous, masks) if image.ndim == 4 else (anomalous[0], masks[0])

    @torch.no_grad()
    def augment(self, image: Tensor, region: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Make anomalies, and give normal and anomalous images the same slight jitter, as the published training does.

        Args:
            image: As in :meth:`forward`.
            region: Where anomalies may be, ``(B, 1, H, W)`` or ``(1, H, W)``, boolean: patches are taken from there
                and pasted there, and nothing changes elsewhere, not even by the jitter. In object mode, it is the
                object. An anomaly that misses it is left out. Left out, anomalies are made everywhere.

        Returns:
            Normal images, anomalous images and masks. Normal and anomalous images are equal outside the masks.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`.
        """
        images = checked_batch(image)
        region = region if region is None or region.ndim == 4 else region[None]
        with _full_precision(images):
            parameters = self.generate_parameters(images, region)
            anomalous, masks = self.apply(images, parameters)
            if region is not None:
                anomalous, masks = torch.where(region, anomalous, images), masks * region
            normal, anomalous = jitter_alike(images, anomalous, masks, parameters.jitter, parameters.order.tolist())
            if region is not None:
                normal, anomalous = torch.where(region, normal, images), torch.where(region, anomalous, images)
        return (normal, anomalous, masks) if image.ndim == 4 else (normal[0], anomalous[0], masks[0])

    def generate_parameters(self, images: Tensor, region: Tensor | None = None) -> FractalParameters:
        """Draw all random numbers for a batch.

        Args:
            images: Images ``(B, C, H, W)``. Their size and device count; in object mode their content, too.
            region: Where the centers of patches are, ``(B, 1, H, W)``, boolean; left out, anywhere.

        Returns:
            The parameters, on the CPU. The noise is on the images' device, and so are corners that a region or an
            object decides about.
        """
        batch, channels, *size = images.shape
        side, source, target = self._place(images, region)
        color = torch.multinomial(torch.tensor(self.color_probabilities), batch, replacement=True)
        strength = torch.tensor([[self.slight_jitter] * 4, [self.strong_jitter] * 2 + [0.0] * 2, [0.0] * 4])
        stamps = torch.randint(2, (batch, 3, 3), dtype=torch.bool)
        # A pattern without a pixel would make an empty mask.
        stamps[:, 1, 1] |= ~stamps.flatten(1).any(1)
        return FractalParameters(
            side=side,
            source=source,
            target=target,
            color=color,
            stamps=stamps,
            noisy=torch.rand(batch) < self.noise_probability,
            active=torch.rand(batch) < self.probability,
            factors=_sample_jitter(strength[color]),
            order=torch.randperm(4),
            channels=torch.randint(channels, (batch, 2)),
            gains=_uniform(self.channel_gain, batch, 2),
            flip=torch.rand(batch, 2) < self.flip_probability,
            angle=_uniform(self.rotation, batch),
            systems=sample_systems(batch, self.maps),
            jitter=_sample_jitter(torch.full((batch, 4), float(self.jitter))),
            noise=self.noise_amplitude * torch.randn(batch, 1, *size, device=images.device),
        )

    def _place(self, images: Tensor, region: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw patch sides ``(B,)`` and corners ``(B, 2)`` of where patches come from and go to."""
        batch, _, *size = images.shape
        side = (_uniform(self.patch_size, batch) * min(size)).long().clamp(min=MIN_PATCH_SIZE)
        shares = torch.rand(2, batch, 2)
        start = self.position_margin * torch.tensor(size)
        room = (1 - 2 * self.position_margin) * torch.tensor(size) - side[:, None]
        corners = (start + shares * room.clamp(min=0)).long()
        if not self.object_mode and region is None:
            return side, *corners
        masks = object_mask(images) if region is None else region
        object_side = side
        if self.object_mode:
            object_side = (_uniform(self.object_patch_size, batch) * shorter_side(masks).cpu()).long()
            object_side = object_side.clamp(MIN_PATCH_SIZE, min(size))
        centers, found = sample_centers(masks.squeeze(1), object_side, shares[..., 0])
        half, corners = (values.to(images.device, non_blocking=True) for values in (object_side // 2, corners))
        corners = torch.where(found[:, None], centers - half[:, None], corners)
        if self.object_mode:  # which has waited for the object's size already
            side = torch.where(found.cpu(), object_side, side)
        return side, *corners

    def apply(self, images: Tensor, parameters: FractalParameters) -> tuple[Tensor, Tensor]:
        """Make the anomalies that the parameters describe.

        Args:
            images: Images ``(B, C, H, W)``.
            parameters: What :meth:`generate_parameters` returned for images of this number and shape.

        Returns:
            Anomalous images ``(B, C, H, W)`` and masks ``(B, 1, H, W)``.
        """
        side, order = parameters.side, parameters.order.tolist()
        parameters = parameters.to(images.device)
        values = single_precision(images)
        # More points than the largest patch has pixels would change little.
        points = min(self.points, int(side.max()) ** 2)
        shapes = draw(parameters.systems, side, parameters.stamps, points)
        pasted, source = cut_out(shapes, parameters, images.shape[-2:])
        patches = values.flatten(2).gather(2, source.flatten(2).expand(-1, images.shape[1], -1))
        patches = self._recolor(patches.reshape(*images.shape[:2], *shapes.shape[1:]), pasted, parameters, order)
        anomalous = paste(values, patches, pasted, parameters.target)
        masks = paste(torch.zeros_like(values[:, :1]), torch.ones_like(patches[:, :1]), pasted, parameters.target)
        for dimension in ((1, 0), (0, 1)):
            reach = [self.dilations * length for length in dimension]
            masks = max_pool2d(masks, [2 * length + 1 for length in reach], stride=1, padding=reach)
        noise = torch.where(parameters.noisy[:, None, None, None], masks * parameters.noise, 0)
        anomalous, masks = (anomalous + noise).clamp(0, 1).to(images.dtype), masks.to(images.dtype)
        return anomalous, masks

    def _recolor(self, patches: Tensor, pasted: Tensor, parameters: FractalParameters, order: list[int]) -> Tensor:
        """Recolor patches ``(B, C, S, S)``, of which the pixels ``pasted`` ``(B, 1, S, S)`` count."""
        count = pasted.sum((-2, -1), keepdim=True).clamp(min=1)
        jittered = jitter(
            patches,
            parameters.factors,
            order,
            lambda gray: (gray * pasted).sum((-2, -1), keepdim=True) / count,
        )
        amplified = (parameters.color == CHANNEL_GAIN)[:, None, None, None]
        return torch.where(amplified, self._amplify(patches, parameters), jittered)

    def _amplify(self, values: Tensor, parameters: FractalParameters) -> Tensor:
        channels = torch.arange(values.shape[1], device=values.device)
        for channel, gain in list(zip(parameters.channels.T, parameters.gains.T, strict=True))[: len(channels)]:
            values = values * torch.where(channel[:, None] == channels, gain[:, None], 1)[..., None, None]
            if self.wrap:
                values = (values * 255).remainder(256) / 255
            values = values.clamp(max=1)
        return values

    def _check_arguments(self) -> None:
        check_interval("patch_size", self.patch_size, 0, 1)
        check_margin(self.position_margin, self.patch_size)
        if len(self.color_probabilities) != 3 or not math.isclose(sum(self.color_probabilities), 1, abs_tol=1e-6):
            msg = f"color_probabilities={self.color_probabilities}: three probabilities that sum to 1 are needed."
            raise ValueError(msg)
        for color_probability in self.color_probabilities:
            check_range("color_probabilities", color_probability, 0, 1)
        check_range("slight_jitter", self.slight_jitter, 0, 0.5)
        check_range("strong_jitter", self.strong_jitter, 0, 1)
        check_interval("channel_gain", self.channel_gain, 0, math.inf)
        check_range("flip_probability", self.flip_probability, 0, 1)
        check_interval("rotation", self.rotation, -360, 360)
        check_count("maps", self.maps, 2)
        check_count("points", self.points, 1)
        check_count("dilations", self.dilations, 0)
        check_range("noise_probability", self.noise_probability, 0, 1)
        check_range("noise_amplitude", self.noise_amplitude, 0, 1)
        check_range("jitter", self.jitter, 0, 0.5)
        check_interval("object_patch_size", self.object_patch_size, 0, math.inf)
        check_range("probability", self.probability, 0, 1)


def _full_precision(images: Tensor) -> torch.autocast:
    """Within, autocast is off: positions in half precision would miss their pixels."""
    return torch.autocast(images.device.type, enabled=False)


def _sample_jitter(strength: Tensor) -> Tensor:
    """Sample factors of brightness, contrast, saturation about 1 and a share of a turn of the hue about 0."""
    spread = strength * (2 * torch.rand_like(strength) - 1)
    return spread + torch.tensor([1.0, 1.0, 1.0, 0.0])


def _uniform(interval: tuple[float, float], *shape: int) -> Tensor:
    low, high = interval
    return low + (high - low) * torch.rand(shape)
