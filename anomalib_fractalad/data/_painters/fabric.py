# SPDX-License-Identifier: Apache-2.0
"""A plain-woven cloth of natural yarn, lit from one side."""

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
    pitch_warp, pitch_weft = scene.normal([7.4, 7.9], 0.12)
    angle = scene.normal(0.0, 0.02)
    x = X + 1.3 * field(scene, 70.0) + 0.25 * field(scene, 9.0)
    y = Y + 1.3 * field(scene, 70.0) + 0.25 * field(scene, 9.0)
    u = (x * np.cos(angle) + y * np.sin(angle)) / pitch_warp + scene.uniform(8, 9)
    v = (y * np.cos(angle) - x * np.sin(angle)) / pitch_weft + scene.uniform(8, 9)
    warp, weft = u.astype(int), v.astype(int)
    du, dv = u - warp - 0.5, v - weft - 0.5
    nudge = 0.05 * scene.standard_normal((2, _THREADS))
    du, dv = du - nudge[0][warp], dv - nudge[1][weft]

    thick_warp, tone_warp = (table[warp, _ROWS] for table in _yarn(scene))
    thick_weft, tone_weft = (table[weft, _COLUMNS] for table in _yarn(scene))
    radius_warp, radius_weft = 0.47 * thick_warp, 0.49 * thick_weft

    if defect == "missing_thread":
        gone, along = (radius_warp, y) if flaw.random() < 0.5 else (radius_weft, x)
        index = warp if gone is radius_warp else weft
        thread = index[index.shape[0] // 2 + flaw.integers(-200, 200), index.shape[1] // 2 + flaw.integers(-200, 200)]
        half = 20.0 + 80.0 * severity
        center = flaw.uniform(half, SIZE - half)
        lost = smoothstep(half, half - 5.0, np.abs(along - center)) * (index == thread)
        gone *= 1.0 - lost * min(1.0, 0.7 + severity)
    elif defect == "cut":
        heading, half = flaw.uniform(0.0, np.pi), 14.0 + 26.0 * severity
        cx, cy = flaw.uniform(55.0, SIZE - 55.0, 2)
        s = (X - cx) * np.cos(heading) + (Y - cy) * np.sin(heading)
        t = (Y - cy) * np.cos(heading) - (X - cx) * np.sin(heading) + 2.5 * field(flaw, 30.0)
        opening = (1.5 + 5.0 * severity) * np.sqrt(np.clip(1.0 - (s / half) ** 2, 0.0, None))
        ends = flaw.uniform(0.55, 1.5, (2, _THREADS))
        tear = np.where(opening > 0.0, np.abs(t) / np.maximum(opening, 0.05), 9.0)
        radius_warp = radius_warp * np.sqrt(smoothstep(0.8, 1.15, tear / ends[0][warp]))
        radius_weft = radius_weft * np.sqrt(smoothstep(0.8, 1.15, tear / ends[1][weft]))

    wave = np.cos(np.pi * (u - 0.5)) * np.cos(np.pi * (v - 0.5))
    arch_warp = np.sqrt(np.clip(1.0 - (du / np.maximum(radius_warp, 1e-3)) ** 2, 0.0, None))
    arch_weft = np.sqrt(np.clip(1.0 - (dv / np.maximum(radius_weft, 1e-3)) ** 2, 0.0, None))
    crest = np.where((warp + weft) % 2 == 0, 1.0, -1.0) * np.abs(wave)
    height_warp = np.where(arch_warp > 0.05, 0.55 * arch_warp + 0.42 * crest, -1.2)
    height_weft = np.where(arch_weft > 0.05, 0.55 * arch_weft - 0.42 * crest, -1.2)
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

    relief = pitch_warp * 0.34 * blur(height + 0.05 * texture, 0.35)
    azimuth = np.deg2rad(-128.0 + scene.normal(0.0, 4.0))
    diffuse, _ = shade(relief, azimuth, np.deg2rad(52.0))
    depth = height - blur(np.maximum(height, -0.3), 3.5)
    occlusion = np.clip(0.72 + 0.42 * depth, 0.12, 1.1)
    light = (0.34 + 0.78 * diffuse) * occlusion * lamp(scene, 0.10)

    fuzz = _fuzz(scene)
    image = over(albedo * light[..., None], np.array([0.60, 0.52, 0.41]) * hue, 0.35 * fuzz)
    if defect == "contamination":
        image = _contaminate(image, severity, light, flaw)
    if defect == "cut":
        image = _fray(image, severity, (cx, cy), heading, half, flaw)
    return image


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


def _fray(
    image: Array,
    severity: float,
    center: tuple[float, float],
    heading: float,
    half: float,
    rng: np.random.Generator,
) -> Array:
    """Loose ends that stick out over a cut."""
    fibers: Array = np.zeros_like(X)
    for _ in range(5 + int(9 * severity)):
        along = rng.uniform(-0.9, 0.9) * half
        start = np.array(center) + along * np.array([np.cos(heading), np.sin(heading)]) + rng.normal(0.0, 1.5, 2)
        turn = heading + rng.choice([-1.0, 1.0]) * rng.uniform(0.7, 2.3)
        fibers = np.maximum(fibers, stroke(curve(rng, start, turn, rng.uniform(4, 9), 1.5), 0.5))
    return over(image, [0.50, 0.42, 0.31], 0.75 * fibers)
