# SPDX-License-Identifier: Apache-2.0
"""An injection-molded gear on a dark mat."""

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
    shade,
    shadow,
    smoothstep,
    stroke,
)

DEFECTS = ("broken_tooth", "contamination", "scratch", "stain")

_TEETH = 20
_ROOT, _TIP = 87.0, 101.0
_RIM, _HUB, _BORE = 74.0, 27.0, 12.5
_WINDOWS, _WINDOW_AT, _WINDOW = 6, 51.0, 11.5


def paint(scene: np.random.Generator, defect: str | None, severity: float, flaw: np.random.Generator) -> Array:
    """Linear light (SIDE, SIDE, 3) of one gear on its mat, with the named defect or none.

    ``scene`` draws the gear and its light and is used alike with and without a defect; ``flaw`` draws the defect.
    """
    cx, cy = SIZE / 2 + scene.normal(0.0, 1.6, 2)
    turn = np.deg2rad(scene.normal(0.0, 1.5))
    size = scene.normal(1.0, 0.006)
    dx, dy = (X - cx) / size, (Y - cy) / size
    theta = np.arctan2(dy, dx) - turn
    outline = _outline(theta)
    if defect == "broken_tooth":
        outline = outline - _fracture(theta, outline, severity, flaw)

    height, plastic = _body(dx, dy, turn, outline)
    matte = grain(scene, (0.5, 0.5, 1.0), (2.0, 2.0, 0.8))
    flow = field(scene, 40.0)
    groove = None
    if defect == "scratch":
        groove = _scratch(severity, cx, cy, flaw)
        height = height - (0.5 + 0.9 * severity) * groove * plastic

    azimuth = np.deg2rad(-130.0 + scene.normal(0.0, 4.0))
    elevation = np.deg2rad(48.0)
    diffuse, gloss = shade(height + 0.035 * matte * plastic, azimuth, elevation)
    lit = shadow(height, azimuth, elevation, 1.6, 22.0)
    occlusion = np.clip(1.0 + 0.035 * (height - blur(height, 7.0)), 0.45, 1.08)

    color = np.array([0.66, 0.635, 0.56]) * scene.normal(1.0, 0.01, 3)
    albedo = color * (1.0 + 0.012 * flow + 0.012 * matte)[..., None]
    mat = 0.052 * (1.0 + 0.16 * matte + 0.05 * field(scene, 50.0))
    if defect == "stain":
        albedo = _stain(albedo, severity, _spot(cx, cy, flaw), flaw)
    if groove is not None:
        albedo = albedo * (1.0 - (0.20 + 0.35 * severity) * groove)[..., None]
    surface = over(mat[..., None] * np.array([0.86, 1.0, 1.16]), albedo, plastic)
    beam = lamp(scene, 0.08)
    light = (0.36 * occlusion + 0.74 * diffuse * lit) * beam
    image = surface * light[..., None] + (0.10 * gloss * lit * plastic * beam)[..., None]
    if defect == "contamination":
        image = _contaminate(image, severity, light, _spot(cx, cy, flaw), flaw)
    return image


def _body(dx: Array, dy: Array, turn: float, outline: Array) -> tuple[Array, Array]:
    """Height of the gear, and the share of each pixel that is plastic, in [0, 1].

    Args:
        dx: Distance of each pixel from the gear's axis, to the right.
        dy: The same, downwards.
        turn: Angle of the gear in radians.
        outline: Radius of the outline in the direction of each pixel.
    """
    radius, theta = np.hypot(dx, dy), np.arctan2(dy, dx) - turn
    sector = 2 * np.pi / _WINDOWS
    fold = (theta + 0.5 * sector) % sector - 0.5 * sector
    window = np.hypot(radius * np.cos(fold) - _WINDOW_AT, radius * np.sin(fold)) - _WINDOW
    half = (theta + sector) % sector - 0.5 * sector
    rib = smoothstep(3.4, 1.8, np.abs(radius * np.sin(half)))
    pin = np.hypot(radius * np.cos(half) - 64.0, radius * np.sin(half) - 6.5)

    height = np.interp(
        radius, [0, _HUB - 1, _HUB + 3, _RIM - 3, _RIM + 1, 200], [20.0, 20.0, 7.0, 7.0, 14.0, 14.0]
    )  # hub, web, rim
    in_web = smoothstep(_HUB, _HUB + 3, radius) * smoothstep(_RIM, _RIM - 3, radius)
    height = height + 5.0 * rib * in_web
    height = height + 1.6 * smoothstep(2.6, 1.2, np.abs(window - 1.2)) * in_web
    height = height - 0.5 * smoothstep(3.6, 3.1, pin) * in_web
    gate = np.hypot(dx - 19.0 * np.cos(turn + 2.2), dy - 19.0 * np.sin(turn + 2.2))
    height = height + 0.9 * smoothstep(2.6, 1.2, gate)
    keyway = smoothstep(3.2, 2.6, np.abs(dx * np.sin(turn) - dy * np.cos(turn))) * (np.abs(theta) < 0.5)
    solid = np.minimum(outline - radius, np.minimum(window, radius - _BORE - 2.2 * keyway))
    plastic = smoothstep(-0.5, 0.5, solid)
    return blur((height - 1.1 * smoothstep(2.0, 0.2, solid)) * plastic, 0.55), plastic


def _outline(theta: Array) -> Array:
    """Radius of the toothed outline: rounded trapezoids between root and tip."""
    phase = np.abs((theta * _TEETH / (2 * np.pi)) % 1.0 - 0.5) * 2.0
    return _ROOT + (_TIP - _ROOT) * smoothstep(0.28, 0.66, phase)


def _fracture(theta: Array, outline: Array, severity: float, rng: np.random.Generator) -> Array:
    """How far the outline has lost of one tooth or two, with a rough break."""
    tooth = (theta * _TEETH / (2 * np.pi)) % _TEETH
    first = rng.integers(_TEETH)
    count = 1.0 + (severity > 0.6)
    away = np.abs((tooth - first - 0.5 * (count - 1.0) + 0.5 * _TEETH) % _TEETH - 0.5 * _TEETH)
    struck = smoothstep(0.5 * count, 0.5 * count - 0.12, away)
    stump = _ROOT + (_TIP - _ROOT) * (0.55 - 0.7 * severity) + 1.3 * field(rng, 5.0) + 0.5 * field(rng, 2.0)
    return struck * np.clip(outline - stump, 0.0, None)


def _spot(cx: float, cy: float, rng: np.random.Generator) -> Array:
    """A point of the gear: on the rim, the web between two windows, or the hub."""
    radius = rng.choice([80.0, 80.0, 64.0, 38.0, 20.0]) + rng.uniform(-3.0, 3.0)
    angle = rng.uniform(0.0, 2 * np.pi)
    return np.array([cx + radius * np.cos(angle), cy + radius * np.sin(angle)])


def _scratch(severity: float, cx: float, cy: float, rng: np.random.Generator) -> Array:
    """Depth in [0, 1] of one or two tool marks."""
    groove: Array = np.zeros_like(X)
    start = _spot(cx, cy, rng)
    heading = np.arctan2(cy - start[1], cx - start[0]) + rng.uniform(-1.2, 1.2)
    for _ in range(rng.integers(1, 3)):
        points = curve(rng, start + rng.normal(0.0, 3.0, 2), heading, 30.0 + 65.0 * severity, 0.5)
        taper = np.sin(np.linspace(0.2, np.pi - 0.2, len(points))) ** 0.5
        groove = np.maximum(groove, stroke(points, taper * (1.2 + 1.8 * severity)))
    return blur(groove, 0.4)


def _stain(albedo: Array, severity: float, spot: Array, rng: np.random.Generator) -> Array:
    """Burnt or discolored plastic, or grease."""
    tint: Array = np.array([[0.34, 0.20, 0.10], [0.22, 0.21, 0.20], [0.62, 0.46, 0.20]])[rng.integers(3)]
    inside = blob(rng, spot, rng.uniform(8.0, 12.0) + 12.0 * severity, 0.35)
    alpha = smoothstep(1.15, 0.6, inside) * (0.55 + 0.42 * severity)
    return albedo * (1.0 - (1.0 - tint) * alpha[..., None])


def _contaminate(image: Array, severity: float, light: Array, spot: Array, rng: np.random.Generator) -> Array:
    """A fiber, or dark granules."""
    alpha: Array = np.zeros_like(X)
    if rng.random() < 0.5:
        points = curve(rng, spot, rng.uniform(0, 2 * np.pi), 30.0 + 60.0 * severity, 4.5)
        alpha = stroke(points, 1.2 + 1.8 * severity)
    else:
        for _ in range(3 + int(6 * severity)):
            grit = spot + rng.normal(0.0, 5.0, (1, 2)) + np.array([[0.0, 0.0], [0.8, 0.5]])
            alpha = np.maximum(alpha, stroke(grit, rng.uniform(1.6, 3.0 + 4.0 * severity)))
    body = np.array([[0.03, 0.03, 0.035], [0.30, 0.04, 0.03], [0.03, 0.07, 0.25]])[rng.integers(3)]
    cast = np.roll(blur(alpha, 0.9), (3, 3), (0, 1))
    shaded = image * (1.0 - 0.5 * cast * (1.0 - alpha))[..., None]
    return over(shaded, body * (0.5 + light)[..., None], alpha)
