# SPDX-License-Identifier: Apache-2.0
"""A plain-woven cloth of natural yarn, lit from one side."""

from typing import NamedTuple

import numpy as np

from anomalib_fractalad.data._painters.canvas import (
    SIZE,
    Array,
    X,
    Y,
    blob,
    blur,
    curve,
    field,
    grain,
    lamp,
    over,
    polygon,
    shade,
    smoothstep,
    stroke,
)

DEFECTS = ("contamination", "cut", "missing_thread", "stain")

_THREADS = 64
_TABLE = Y.shape[0]
_ROWS = (Y * _TABLE / SIZE).astype(int)
_COLUMNS = (X * _TABLE / SIZE).astype(int)


def _yarn(rng: np.random.Generator) -> tuple[Array, Array]:
    """Thickness and tone of each thread along its length, both about 1, of shape (threads, length)."""
    length = np.arange(_TABLE) / _TABLE * 40.0
    knots = rng.standard_normal((2, _THREADS, 42))
    along = np.stack([[np.interp(length, np.arange(42), row) for row in table] for table in knots])
    per_thread = rng.standard_normal((2, _THREADS, 1))
    slubs = (rng.random((_THREADS, 42)) < 0.012) * rng.uniform(0.1, 0.3, (_THREADS, 42))
    slub = np.stack([np.interp(length, np.arange(42), row) for row in slubs])
    thickness = 1.0 + 0.035 * per_thread[0] + 0.04 * along[0] + slub
    tone = 1.0 + 0.05 * per_thread[1] + 0.06 * along[1] + 0.3 * slub
    return thickness, tone


def paint(scene: np.random.Generator, defect: str | None, severity: float, flaw: np.random.Generator) -> Array:
    """Linear light (SIDE, SIDE, 3) of one piece of cloth, with the named defect or none.

    ``scene`` draws the cloth and its light and is used alike with and without a defect; ``flaw`` draws the defect.
    """
    weave = _Weave.draw(scene)
    (u, v), (warp, weft), (du, dv) = weave.across, weave.threads, weave.off_center
    thick_warp, tone_warp = (table[warp, _ROWS] for table in _yarn(scene))
    thick_weft, tone_weft = (table[weft, _COLUMNS] for table in _yarn(scene))
    radius_warp, radius_weft = 0.47 * thick_warp, 0.49 * thick_weft

    tear = None
    if defect == "missing_thread":
        _lose_thread((radius_warp, radius_weft), weave.threads, weave.places, severity, flaw)
    elif defect == "cut":
        tear = _Tear.draw(severity, flaw)
        radius_warp, radius_weft = tear.end_threads((radius_warp, radius_weft), weave.threads)

    height_warp, height_weft = _heights(
        weave.across, weave.threads, (du / np.maximum(radius_warp, 1e-3), dv / np.maximum(radius_weft, 1e-3))
    )
    on_top = height_warp > height_weft
    height = np.maximum(np.maximum(height_warp, height_weft), -1.0)

    fibers = grain(scene, (2.2, 0.35, 1.0), angle=0.35)
    twist = np.sin(2 * np.pi * np.where(on_top, 1.6 * v + 1.3 * du, 1.6 * u + 1.3 * dv))
    texture = np.where(on_top, fibers.T, fibers)
    tone = np.where(on_top, tone_warp, 0.95 * tone_weft) * (1.0 + 0.10 * texture + 0.05 * twist)
    tone = tone * (1.0 + 0.025 * field(scene, 45.0))
    hue = scene.normal(1.0, 0.012, 3)
    albedo = tone[..., None] * np.array([0.64, 0.53, 0.39]) * hue
    background = height <= -0.99
    albedo[background] = np.array([0.05, 0.045, 0.04])

    if defect == "stain":
        albedo = _stain(albedo, severity, texture, flaw)

    light = _light(height, weave.pitch * 0.34 * blur(height + 0.05 * texture, 0.35), scene)
    fuzz = _fuzz(scene)
    image = over(albedo * light[..., None], np.array([0.60, 0.52, 0.41]) * hue, 0.35 * fuzz)
    if defect == "contamination":
        image = _contaminate(image, severity, light, flaw)
    if tear is not None:
        image = _fray(image, severity, tear, flaw)
    return image


class _Weave(NamedTuple):
    """Where the threads lie; pairs are those of the warp and the weft.

    Attributes:
        pitch: Distance of two threads of the warp.
        places: Coordinates in the cloth, which is never quite flat.
        across: The same, counted in threads.
        threads: Number of the thread at each place.
        off_center: Distance from the thread's middle, in threads.
    """

    pitch: float
    places: tuple[Array, Array]
    across: tuple[Array, Array]
    threads: tuple[Array, Array]
    off_center: tuple[Array, Array]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "_Weave":
        pitch_warp, pitch_weft = rng.normal([7.4, 7.9], 0.12)
        angle = rng.normal(0.0, 0.02)
        x = X + 1.3 * field(rng, 70.0) + 0.25 * field(rng, 9.0)
        y = Y + 1.3 * field(rng, 70.0) + 0.25 * field(rng, 9.0)
        u = (x * np.cos(angle) + y * np.sin(angle)) / pitch_warp + rng.uniform(8, 9)
        v = (y * np.cos(angle) - x * np.sin(angle)) / pitch_weft + rng.uniform(8, 9)
        warp, weft = u.astype(int), v.astype(int)
        nudge = 0.05 * rng.standard_normal((2, _THREADS))
        off_center = (u - warp - 0.5 - nudge[0][warp], v - weft - 0.5 - nudge[1][weft])
        return cls(pitch_warp, (x, y), (u, v), (warp, weft), off_center)


def _lose_thread(
    radii: tuple[Array, Array],
    threads: tuple[Array, Array],
    places: tuple[Array, Array],
    severity: float,
    rng: np.random.Generator,
) -> None:
    """Thin a stretch of one thread of the warp or the weft, in place."""
    way = 0 if rng.random() < 0.5 else 1
    index, along = threads[way], places[1 - way]
    thread = index[index.shape[0] // 2 + rng.integers(-200, 200), index.shape[1] // 2 + rng.integers(-200, 200)]
    half = 20.0 + 80.0 * severity
    center = rng.uniform(half, SIZE - half)
    lost = smoothstep(half, half - 5.0, np.abs(along - center)) * (index == thread)
    radii[way][...] *= 1.0 - lost * min(1.0, 0.7 + severity)


class _Tear(NamedTuple):
    """A cut that gapes: its center, heading and half length, distance from it in widths, and where threads end."""

    center: Array
    heading: float
    half: float
    distance: Array
    ends: Array

    @classmethod
    def draw(cls, severity: float, rng: np.random.Generator) -> "_Tear":
        heading, half = rng.uniform(0.0, np.pi), 14.0 + 26.0 * severity
        cx, cy = center = rng.uniform(55.0, SIZE - 55.0, 2)
        s = (X - cx) * np.cos(heading) + (Y - cy) * np.sin(heading)
        t = (Y - cy) * np.cos(heading) - (X - cx) * np.sin(heading) + 2.5 * field(rng, 30.0)
        opening = (1.5 + 5.0 * severity) * np.sqrt(np.clip(1.0 - (s / half) ** 2, 0.0, None))
        ends = rng.uniform(0.55, 1.5, (2, _THREADS))
        distance = np.where(opening > 0.0, np.abs(t) / np.maximum(opening, 0.05), 9.0)
        return cls(center, heading, half, distance, ends)

    def end_threads(self, radii: tuple[Array, Array], threads: tuple[Array, Array]) -> tuple[Array, Array]:
        """Radii of warp and weft that taper off toward the cut."""
        warp, weft = (
            radius * np.sqrt(smoothstep(0.8, 1.15, self.distance / ends[index]))
            for radius, ends, index in zip(radii, self.ends, threads, strict=True)
        )
        return warp, weft


def _heights(
    places: tuple[Array, Array],
    threads: tuple[Array, Array],
    across: tuple[Array, Array],
) -> tuple[Array, Array]:
    """Heights of warp and weft, that take turns on top; ``across`` is the place within a thread, 1 at its edge."""
    u, v = places
    wave = np.cos(np.pi * (u - 0.5)) * np.cos(np.pi * (v - 0.5))
    arch_warp, arch_weft = (np.sqrt(np.clip(1.0 - edge**2, 0.0, None)) for edge in across)
    crest = np.where((threads[0] + threads[1]) % 2 == 0, 1.0, -1.0) * np.abs(wave)
    height_warp = np.where(arch_warp > 0.05, 0.55 * arch_warp + 0.42 * crest, -1.2)
    height_weft = np.where(arch_weft > 0.05, 0.55 * arch_weft - 0.42 * crest, -1.2)
    return height_warp, height_weft


def _light(height: Array, relief: Array, rng: np.random.Generator) -> Array:
    """Light that falls on each place: little between the threads."""
    azimuth = np.deg2rad(-128.0 + rng.normal(0.0, 4.0))
    diffuse, _ = shade(relief, azimuth, np.deg2rad(52.0))
    depth = height - blur(np.maximum(height, -0.3), 3.5)
    occlusion = np.clip(0.72 + 0.42 * depth, 0.12, 1.1)
    light: Array = (0.34 + 0.78 * diffuse) * occlusion * lamp(rng, 0.10)
    return light


def _fuzz(rng: np.random.Generator) -> Array:
    """Coverage of the short loose fibers that any cloth has."""
    fuzz: Array = np.zeros_like(X)
    for _ in range(7):
        points = curve(rng, rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi), rng.uniform(6, 22), 2.5)
        fuzz = np.maximum(fuzz, stroke(points, 0.4) * rng.uniform(0.3, 1.0))
    return fuzz


def _stain(albedo: Array, severity: float, texture: Array, rng: np.random.Generator) -> Array:
    """Oil, coffee, ink or rust that has soaked in, darker at its rim."""
    tint: Array = np.array([[0.62, 0.58, 0.50], [0.50, 0.36, 0.22], [0.30, 0.36, 0.62], [0.68, 0.40, 0.22]])[
        rng.integers(4)
    ]
    radius = rng.uniform(11.0, 18.0) + 20.0 * severity * rng.random()
    inside = blob(rng, rng.uniform(45.0, SIZE - 45.0, 2), radius, 0.32) + 0.03 * texture
    soaked = 0.8 * smoothstep(1.12, 0.80, inside) + 0.2 * np.exp(-(((inside - 0.92) / 0.10) ** 2))
    strength = soaked * (0.42 + 0.58 * severity) * (1.0 + 0.12 * texture)
    return albedo * (1.0 - (1.0 - tint) * np.clip(strength, 0.0, 1.0)[..., None])


def _contaminate(image: Array, severity: float, light: Array, rng: np.random.Generator) -> Array:
    """A foreign fiber, or crumbs of dirt, lying on the cloth with their shadow."""
    center = rng.uniform(50.0, SIZE - 50.0, 2)
    if rng.random() < 0.5:
        color = np.array([[0.03, 0.03, 0.04], [0.45, 0.03, 0.03], [0.04, 0.08, 0.35], [0.85, 0.85, 0.86]])
        points = curve(rng, center, rng.uniform(0, 2 * np.pi), 30.0 + 70.0 * severity, 4.0)
        alpha = stroke(points, 0.9 + 1.6 * severity)
        body = color[rng.integers(4)] * (0.6 + 0.5 * light)[..., None]
    else:
        alpha = np.zeros_like(X)
        for _ in range(3 + int(6 * severity)):
            corners = np.sort(rng.uniform(0, 2 * np.pi, 8))
            radii = rng.uniform(0.5, 1.0, 8) * rng.uniform(1.8, 3.0 + 4.5 * severity)
            crumb = center + rng.normal(0.0, 5.0 + 7.0 * severity, 2)
            outline = crumb + np.stack([np.cos(corners), np.sin(corners)], 1) * radii[:, None]
            alpha = np.maximum(alpha, polygon(outline))
        dirt = np.array([[0.10, 0.07, 0.045], [0.04, 0.04, 0.045], [0.20, 0.13, 0.06]])[rng.integers(3)]
        body = dirt * (light * (1.0 + 0.25 * grain(rng, (0.7, 0.7, 1.0))))[..., None]
    cast = np.roll(blur(alpha, 0.9), (3, 3), (0, 1))
    return over(image * (1.0 - 0.6 * cast * (1.0 - alpha))[..., None], body, alpha)


def _fray(image: Array, severity: float, tear: _Tear, rng: np.random.Generator) -> Array:
    """Loose ends that stick out over a cut."""
    fibers: Array = np.zeros_like(X)
    for _ in range(5 + int(9 * severity)):
        along = rng.uniform(-0.9, 0.9) * tear.half
        start = tear.center + along * np.array([np.cos(tear.heading), np.sin(tear.heading)]) + rng.normal(0.0, 1.5, 2)
        turn = tear.heading + rng.choice([-1.0, 1.0]) * rng.uniform(0.7, 2.3)
        fibers = np.maximum(fibers, stroke(curve(rng, start, turn, rng.uniform(4, 9), 1.5), 0.5))
    return over(image, [0.50, 0.42, 0.31], 0.75 * fibers)
