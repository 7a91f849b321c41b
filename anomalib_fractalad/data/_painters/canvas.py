# SPDX-License-Identifier: Apache-2.0
"""What the painters share: noise, blur, strokes, blobs, light on a relief, and the camera.

Scenes are painted in linear light at ``SCALE`` times the output size. Lengths are in output pixels. All arithmetic is
single-threaded float64, so that the written bytes depend on neither the number of threads nor the global seeds.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

Array: TypeAlias = NDArray[np.float64]

SIZE = 256
SCALE = 2
SIDE = SIZE * SCALE
_centers: Array = (np.arange(SIDE) + 0.5) / SCALE
X: Array = np.tile(_centers, (SIDE, 1))
Y: Array = X.T.copy()
_FREQ_Y: Array = np.asarray(np.fft.fftfreq(SIDE)[:, None] * SCALE, np.float64)
_FREQ_X: Array = np.asarray(np.fft.rfftfreq(SIDE)[None] * SCALE, np.float64)
_FALL_OFF: Array = 1.0 - 0.22 * ((X / SIZE - 0.5) ** 2 + (Y / SIZE - 0.5) ** 2)


def smoothstep(low: float, high: float, x: Array) -> Array:
    """Cubic ramp from 0 at ``low`` to 1 at ``high``; falls where ``low`` is above ``high``."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _gaussian(along: float, across: float, angle: float) -> Array:
    """Transfer function of a Gaussian whose long axis lies at ``angle`` (radians)."""
    if along == across:
        round_: Array = np.exp(-2.0 * (np.pi * along * _FREQ_X) ** 2) * np.exp(-2.0 * (np.pi * along * _FREQ_Y) ** 2)
        return round_
    cos, sin = np.cos(angle), np.sin(angle)
    squares = (along * (_FREQ_X * cos + _FREQ_Y * sin)) ** 2 + (across * (_FREQ_Y * cos - _FREQ_X * sin)) ** 2
    stretched: Array = np.exp(-2.0 * np.pi**2 * squares)
    return stretched


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur, periodic at the borders."""
    return np.fft.irfft2(np.fft.rfft2(image) * _gaussian(sigma, sigma, 0.0), s=(SIDE, SIDE))


def grain(rng: np.random.Generator, *layers: tuple[float, float, float], angle: float = 0.0) -> Array:
    """Oriented noise of unit variance: a weighted sum of ``(along, across, weight)`` Gaussian streaks."""
    noise = np.fft.rfft2(rng.standard_normal((SIDE, SIDE)))
    transfer: Array = np.zeros((SIDE, SIDE // 2 + 1))
    for along, across, weight in layers:
        kernel = _gaussian(along, across, angle)
        transfer += weight * kernel / np.sqrt(np.mean(kernel**2))
    streaks: Array = np.fft.irfft2(noise * transfer, s=(SIDE, SIDE))
    streaks /= streaks.std()
    return streaks


def field(rng: np.random.Generator, scale: float) -> Array:
    """Smooth noise of about unit variance with features ``scale`` pixels wide."""
    cells = int(np.ceil(SIZE / scale)) + 4
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32) * 1.4)
    box = (2.0, 2.0, 2.0 + SIZE / scale, 2.0 + SIZE / scale)
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box), dtype=np.float64)


def curve(rng: np.random.Generator, start: ArrayLike, heading: float, length: float, bend: float) -> Array:
    """Points ``(M, 2)`` along a line that bends at random; ``bend`` is the turn in radians over its length."""
    steps = max(int(length / 2.0), 4)
    turns = np.cumsum(np.convolve(rng.standard_normal(steps + 8), np.ones(9) / 3.0, "valid")) / np.sqrt(steps * 9.0)
    headings = heading + bend * turns
    return np.asarray(start) + np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1), 0) * length / steps


def stroke(points: Array, width: float | Array) -> Array:
    """Anti-aliased coverage in [0, 1] of a line through ``points`` with one width, or one for each point."""
    zoom = 2 * SCALE
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    draw = ImageDraw.Draw(canvas)
    scaled = points * zoom
    widths = np.broadcast_to(width, len(points)) * zoom
    for (x0, y0), (x1, y1), w in zip(scaled[:-1], scaled[1:], widths[1:], strict=True):
        draw.line((x0, y0, x1, y1), fill=255, width=max(round(w), 1))
        draw.ellipse((x1 - w / 2, y1 - w / 2, x1 + w / 2, y1 + w / 2), fill=255)
    return np.asarray(canvas.reduce(2), dtype=np.float64) / 255.0


def polygon(points: Array) -> Array:
    """Anti-aliased coverage in [0, 1] of a filled polygon."""
    canvas = Image.new("L", (2 * SIDE, 2 * SIDE))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in points * 2 * SCALE], fill=255)
    return np.asarray(canvas.reduce(2), dtype=np.float64) / 255.0


def blob(rng: np.random.Generator, center: ArrayLike, radius: float, roughness: float = 0.25) -> Array:
    """Distance from ``center`` in units of a ragged, stretched outline: below 1 inside the blob."""
    angle, stretch = rng.uniform(0.0, np.pi), rng.uniform(1.0, 1.5)
    cx, cy = np.asarray(center)
    dx, dy = X - cx, Y - cy
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    distance = np.hypot(along / stretch**0.5, across * stretch**0.5) / radius
    coarse, fine = 0.35 * radius, max(0.12 * radius, 1.0)
    rough: Array = distance + roughness * 0.8 * grain(rng, (coarse, coarse, 0.7), (fine, fine, 0.3))
    return rough


def over(below: Array, color: ArrayLike, alpha: Array) -> Array:
    """``color`` laid over an image (H, W, 3) with coverage ``alpha`` (H, W)."""
    return below + (np.asarray(color) - below) * alpha[..., None]


def shade(relief: Array, azimuth: float, elevation: float, gloss: float = 24.0) -> tuple[Array, Array]:
    """Diffuse and specular light, each in [0, 1], on a relief seen from above; angles in radians."""
    slope_y, slope_x = np.gradient(relief * SCALE)
    norm = 1.0 / np.sqrt(1.0 + slope_x**2 + slope_y**2)
    light = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    half = (light + np.array([0.0, 0.0, 1.0])) / np.sqrt(2.0 + 2.0 * light[2])
    diffuse = np.clip((light[2] - slope_x * light[0] - slope_y * light[1]) * norm, 0.0, None)
    specular = np.clip((half[2] - slope_x * half[0] - slope_y * half[1]) * norm, 0.0, None)
    return diffuse, specular**gloss


def shadow(relief: Array, azimuth: float, elevation: float, softness: float, reach: float) -> Array:
    """Share of the light, in [0, 1], that reaches each point of a relief past what stands within ``reach`` pixels."""
    step = 1.5
    blocked = np.zeros_like(relief)
    for distance in np.arange(step, reach, step):
        shift = (-round(np.sin(azimuth) * distance * SCALE), -round(np.cos(azimuth) * distance * SCALE))
        np.maximum(blocked, np.roll(relief, shift, (0, 1)) - relief - distance * np.tan(elevation), out=blocked)
    return 1.0 - blur(smoothstep(0.0, 2.0, blocked), softness)


def lamp(rng: np.random.Generator, unevenness: float) -> Array:
    """Brightness over the field of view: exposure, a gradient, the lens's fall-off to the corners."""
    across, down, exposure = rng.normal(0.0, [unevenness, unevenness, 0.03])
    x, y = X[:1] / SIZE - 0.5, Y[:, :1] / SIZE - 0.5
    brightness: Array = (1.0 + exposure) * (1.0 + across * x + down * y) * _FALL_OFF
    return brightness


def encode(light: Array) -> Array:
    """Gray levels in [0, 255], not yet rounded, of linear light."""
    return 255.0 * np.clip(light, 0.0, 1.0) ** (1.0 / 2.2)


def expose(scene: Array) -> Array:
    """Linear light (SIZE, SIZE, 3) on the sensor: a soft lens, then the average over each pixel."""
    rows = np.add.reduce([scene[i::SCALE] for i in range(SCALE)])
    signal: Array = np.add.reduce([rows[:, i::SCALE] for i in range(SCALE)]) / SCALE**2
    for axis in (0, 1):
        padded = np.pad(signal, [(1, 1) if i == axis else (0, 0) for i in range(3)], mode="edge")
        before, after = padded.take(range(SIZE), axis), padded.take(range(2, SIZE + 2), axis)
        signal = 0.76 * signal + 0.12 * (before + after)
    return signal


def photograph(signal: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The 8-bit image of linear light, with photon and read-out noise."""
    noise = rng.standard_normal((SIZE, SIZE, 4))
    noise = 0.7 * noise[..., :3] + 0.5 * noise[..., 3:]
    noisy = signal + noise * np.sqrt(1.2e-4 * np.clip(signal, 0.0, None) + 2e-6)
    return np.rint(encode(noisy)).astype(np.uint8)
