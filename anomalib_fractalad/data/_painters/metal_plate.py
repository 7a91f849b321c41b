# SPDX-License-Identifier: Apache-2.0
"""A brushed steel plate under a strip light."""

import numpy as np

from anomalib_fractalad.data._painters.canvas import (
    SCALE,
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
    smoothstep,
    stroke,
)

DEFECTS = ("contamination", "dent", "scratch", "stain")


def paint(scene: np.random.Generator, defect: str | None, severity: float, flaw: np.random.Generator) -> Array:
    """Linear light (SIDE, SIDE, 3) of one plate, with the named defect or none.

    ``scene`` draws the plate and its light and is used alike with and without a defect; ``flaw`` draws the defect.
    """
    angle = scene.normal(0.0, 0.025)
    fine = grain(scene, (25.0, 0.28, 0.5), (70.0, 0.32, 0.7), (140.0, 0.9, 0.4), (90.0, 5.0, 0.12), angle=angle)
    sparse = grain(scene, (30.0, 0.25, 1.0), angle=angle)
    streaks = 0.085 * fine + 0.05 * np.clip(sparse - 1.6, 0.0, None) - 0.07 * np.clip(-sparse - 1.7, 0.0, None)
    streaks = streaks + 0.02 * grain(scene, (1.2, 0.3, 1.0), angle=angle)
    bands = scene.normal([88.0, 235.0], 9.0)
    widths = scene.normal([62.0, 40.0], 4.0)
    strengths = scene.normal([0.22, 0.10], 0.015)
    haze = field(scene, 60.0)

    slope_x, slope_y, dull = np.zeros((3, *X.shape))
    if defect == "dent":
        slope_x, slope_y, dull = _dent(severity, flaw)
    # Grooves spread light across themselves: a strip light becomes a band across the brushing, and a tilted spot
    # shows the part of the band that lies where it is turned to.
    x = X + Y * angle * 2.0 + 2.0 * haze + 150.0 * slope_x
    reflected = 0.24 + 0.05 * (Y / SIZE) + 0.34 * slope_y - 0.10 * dull
    for band, width, strength in zip(bands, widths, strengths, strict=True):
        reflected = reflected + strength * np.exp(-(((x - band) / width) ** 2))
    brightness = reflected * (1.0 + streaks + 0.01 * haze)
    warmth = 0.012 * field(scene, 110.0) + scene.normal(0.0, 0.006)
    tint = np.stack([0.985 + warmth, np.ones_like(X), 1.02 - warmth], -1)
    image: Array = np.clip(brightness, 0.01, None)[..., None] * tint * lamp(scene, 0.06)[..., None]

    if defect == "scratch":
        return _scratch(image, severity, angle, flaw)
    if defect == "stain":
        return _stain(image, severity, flaw)
    if defect == "contamination":
        return _contaminate(image, severity, flaw)
    return image


def _dent(severity: float, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Slopes of a pressed-in spot, and how far its crushed ground has lost its shine."""
    radius = rng.uniform(7.0, 10.0) + 11.0 * severity * rng.random()
    inside = blob(rng, rng.uniform(45.0, SIZE - 45.0, 2), radius, 0.05)
    pressed = smoothstep(1.3, 0.1, inside)
    relief = -(0.10 + 0.22 * severity) * radius * SCALE * pressed
    return np.gradient(relief, axis=1), np.gradient(relief, axis=0), pressed * (0.4 + severity)


def _scratch(image: Array, severity: float, brushing: float, rng: np.random.Generator) -> Array:
    """One to three grooves across the brushing, a bright burr along one flank."""
    heading = brushing + rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 1.5)
    length, start = 35.0 + 90.0 * severity, rng.uniform(70.0, SIZE - 70.0, 2)
    start = start - 0.5 * length * np.array([np.cos(heading), np.sin(heading)])
    pressure = field(rng, 12.0)
    for _ in range(rng.integers(1, 4)):
        points = curve(rng, start + rng.normal(0.0, 4.0, 2), heading + rng.normal(0.0, 0.05), length, 0.35)
        taper = np.sin(np.linspace(0.15, np.pi - 0.15, len(points))) ** 0.5
        groove = stroke(points, taper * (0.8 + 1.3 * severity)) * np.clip(0.85 + 0.2 * pressure, 0.3, 1.0)
        burr = np.roll(groove, (-2, -1), (0, 1)) * (1.0 - groove)
        image = image * (1.0 - (0.40 + 0.4 * severity) * groove)[..., None]
        image = image + ((0.08 + 0.32 * severity) * burr)[..., None]
    return image


def _stain(image: Array, severity: float, rng: np.random.Generator) -> Array:
    """A dried drop, a spot of rust, or the print of a finger."""
    center = rng.uniform(50.0, SIZE - 50.0, 2)
    kind = rng.integers(3)
    if kind == 0:
        inside = blob(rng, center, rng.uniform(11.0, 20.0) + 8.0 * severity, 0.22)
        ring = np.exp(-(((inside - 0.95) / 0.06) ** 2)) + 0.4 * np.exp(-(((inside - 0.78) / 0.05) ** 2))
        film: Array = (0.38 + 0.14 * field(rng, 9.0)) * smoothstep(1.02, 0.9, inside) + 0.6 * ring
        film *= 0.22 + 0.4 * severity
        dried: Array = image * (1.0 - film[..., None] * np.array([0.75, 0.9, 1.0]))
        return dried
    if kind == 1:
        inside = blob(rng, center, rng.uniform(9.0, 14.0) + 10.0 * severity, 0.45)
        pits = 0.5 + 0.5 * np.tanh(1.5 * grain(rng, (1.0, 1.0, 1.0), (3.0, 3.0, 1.0)))
        rust = smoothstep(1.15, 0.6, inside) * (0.35 + 0.65 * pits) * (0.4 + 0.55 * severity)
        return over(image, np.array([0.19, 0.08, 0.035]) * (0.4 + pits[..., None]), rust)
    dx, dy = X - center[0], Y - center[1]
    tilt = rng.uniform(-0.6, 0.6)
    along, across = dx * np.sin(tilt) + dy * np.cos(tilt), dx * np.cos(tilt) - dy * np.sin(tilt)
    pad = smoothstep(1.05, 0.7, np.hypot(along / 27.0, across / 19.0) + 0.08 * field(rng, 12.0))
    whorl = np.hypot(along * 0.75 + 6.0, across) + 2.2 * field(rng, 18.0)
    ridges = 0.5 + 0.5 * np.tanh(2.0 * np.cos(2 * np.pi * whorl / 3.6) + 0.6 * field(rng, 6.0))
    print_ = pad * (0.25 + 0.75 * ridges) * (0.20 + 0.32 * severity)
    return over(image, [0.13, 0.135, 0.14], print_)


def _contaminate(image: Array, severity: float, rng: np.random.Generator) -> Array:
    """Swarf, or fibers and dust."""
    center = rng.uniform(55.0, SIZE - 55.0, 2)
    light = image.mean(-1)
    if rng.random() < 0.5:
        points = curve(rng, center, rng.uniform(0, 2 * np.pi), 25.0 + 55.0 * severity, 9.0)
        width = 1.4 + 1.8 * severity
        alpha = stroke(points, width)
        edge = np.clip(alpha - np.roll(alpha, (2, 2), (0, 1)), 0.0, 1.0)
        gleam = np.clip(0.5 + 0.5 * field(rng, 7.0), 0.0, 1.0)
        body = (0.10 + 0.30 * gleam + 0.45 * edge)[..., None] * np.array([1.0, 0.98, 0.94])
    else:
        alpha = np.zeros_like(X)
        for _ in range(2 + int(3 * severity)):
            start = center + rng.normal(0.0, 9.0, 2)
            points = curve(rng, start, rng.uniform(0, 2 * np.pi), 10.0 + 35.0 * severity * rng.random(), 3.5)
            alpha = np.maximum(alpha, stroke(points, rng.uniform(0.6, 0.9 + 0.9 * severity)))
        for _ in range(5 + int(9 * severity)):
            speck = center + rng.normal(0.0, 12.0, (1, 2)) + np.array([[0.0, 0.0], [0.7, 0.3]])
            alpha = np.maximum(alpha, stroke(speck, rng.uniform(0.7, 2.0 + 1.2 * severity)))
        shade_ = np.array([[0.05, 0.05, 0.055], [0.10, 0.08, 0.06], [0.06, 0.09, 0.2]])[rng.integers(3)]
        body = shade_ * (0.6 + light)[..., None]
    cast = np.roll(blur(alpha, 0.8), (3, 2), (0, 1))
    return over(image * (1.0 - 0.5 * cast * (1.0 - alpha))[..., None], body, alpha * (0.75 + 0.25 * severity))
