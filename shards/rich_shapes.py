"""Shapes of the objects in rich synthetic scenes, drawn as masks: compact, jagged, thin and with holes.

mask = draw_compact(rng, "branch", side)        # uint8 [side, side], 255 inside; the border stays empty
mask = draw_skyline(rng, height, width)         # uint8 [height, width], from the left border to the right one
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

_BITS = 4  # fractional bits of coordinates in OpenCV's drawing: units of 1/16 pixel
REACH = 0.9  # fraction of the half side that a compact shape fills


def draw_compact(rng: np.random.Generator, kind: str, side: int) -> np.ndarray:
    """Draw a shape of a kind in `COMPACT` into a square of `side` pixels."""
    mask = np.zeros((side, side), np.uint8)
    COMPACT[kind](rng, mask, side / 2, REACH * side / 2)
    return np.pad(mask[1:-1, 1:-1], 1)  # a thick line may reach the border


def draw_skyline(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw hills, roofs or treetops: everything below a rugged line."""
    steps = max(width // 4, 8)
    x = np.linspace(0, width, steps)
    kind = rng.choice(["hills", "roofs", "trees"])
    octaves = range(1, 8 if kind == "trees" else 5)
    waves = [np.cos(x / width * 2 * np.pi * 2**k * rng.uniform(0.7, 1.4) + rng.uniform(0, 7)) / 1.6**k for k in octaves]
    line = np.sum(waves, axis=0)
    if kind == "roofs":
        flats = np.sort(rng.uniform(0, width, int(rng.integers(3, 16))))
        levels = rng.uniform(-1, 1, len(flats) + 1)
        line = levels[np.searchsorted(flats, x)] + 0.02 * line
    line = (line - line.min()) / max(float(np.ptp(line)), 1e-6)
    top = height * (0.04 + rng.uniform(0.1, 0.9) * line)
    outline = np.concatenate([np.stack([x, top], axis=1), [[width, height], [0, height]]])
    mask = np.zeros((height, width), np.uint8)
    _fill(mask, outline)
    return mask


def draw_bars(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    """Draw a fence, a net, poles or wires from border to border, with gaps and widths in units of `unit` mask pixels."""
    mask = np.zeros((height, width), np.uint8)
    kind = rng.choice(["fence", "net", "poles", "wires"])
    gap = unit * float(np.exp(rng.uniform(np.log(10), np.log(60))))
    thick = max(1, round(min(unit * float(np.exp(rng.uniform(np.log(1), np.log(6)))), gap / 3)))
    if kind == "wires":
        for _ in range(int(rng.integers(1, 7))):
            ends = rng.uniform(-0.2, 1.2, 2) * height
            x = np.linspace(0, 1, 40)
            sag = rng.uniform(0, 0.2) * height * 4 * x * (1 - x)
            _lines(mask, [np.stack([x * width, ends[0] + (ends[1] - ends[0]) * x + sag], axis=1)], thick)
        return mask
    if kind == "poles":
        gap, thick = gap * 4, thick * int(rng.integers(1, 6))
    jitter = 0.25 * gap if kind == "poles" else 0.0
    slants = {"fence": [0.0], "poles": [rng.uniform(-0.1, 0.1)], "net": [rng.uniform(0.3, 1.2)] * 2}[str(kind)]
    for number, slant in enumerate(slants):
        lean = slant * height * (-1) ** number
        starts = np.arange(-abs(lean), width + abs(lean), gap)
        starts = starts + rng.uniform(-jitter, jitter, len(starts)) if jitter else starts
        _lines(mask, [np.array([[x - lean / 2, 0], [x + lean / 2, height]]) for x in starts], thick)
    if kind == "fence":
        _lines(mask, [np.array([[0, y], [width, y]]) for y in rng.uniform(0, height, int(rng.integers(1, 4)))], 2 * thick)
    return mask


def draw_segment(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a limb that fills the width of its box: a bar with round ends, thicker at its start."""
    mask = np.zeros((height, width), np.uint8)
    middle, thick, thin = height / 2, 0.45 * height, rng.uniform(0.25, 0.45) * height
    start, end = thick + 1, width - thin - 1
    _fill(mask, np.array([[start, middle - thick], [end, middle - thin], [end, middle + thin], [start, middle + thick]]))
    for x, radius in ((start, thick), (end, thin)):
        cv2.circle(mask, (_fix(x), _fix(middle)), _fix(radius), 255, -1, cv2.LINE_AA, _BITS)
    return mask


def _draw_blob(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    waves = [rng.uniform(0, 0.6 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 9)]
    radii = np.maximum(1.3 + np.sum(waves, axis=0), 0.15)
    _fill(mask, _polar(middle, radii / radii.max() * radius, angles))


def _draw_polygon(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    corners = int(rng.integers(3, 10))
    angles = (np.arange(corners) + rng.uniform(-0.35, 0.35, corners)) * 2 * np.pi / corners
    _fill(mask, _polar(middle, rng.uniform(0.35, 1, corners) * radius, angles))


def _draw_box(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    flat, turn = rng.uniform(0.15, 1.2), rng.uniform(0, np.pi)
    _fill(mask, _polar(middle, np.full(4, radius), turn + np.array([-flat, flat, np.pi - flat, np.pi + flat]) / 1.6))


def _draw_ellipse(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    axes = _fix(radius), _fix(radius * rng.uniform(0.3, 1))
    cv2.ellipse(mask, (_fix(middle), _fix(middle)), axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA, _BITS)


def _draw_ring(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    thick = max(1, int(radius * rng.uniform(0.04, 0.4)))
    cv2.circle(mask, (_fix(middle), _fix(middle)), _fix(radius - thick / 2), 255, thick, cv2.LINE_AA, _BITS)


def _draw_wheel(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    thick = max(1, int(radius * rng.uniform(0.03, 0.15)))
    cv2.circle(mask, (_fix(middle), _fix(middle)), _fix(radius - thick), 255, thick, cv2.LINE_AA, _BITS)
    spokes = int(rng.integers(3, 24))
    angles = np.arange(spokes) * 2 * np.pi / spokes + rng.uniform(0, 1)
    ends = _polar(middle, np.full(spokes, radius - thick), angles)
    _lines(mask, [np.stack([np.full(2, middle), end]) for end in ends], max(1, thick // 2))


def _draw_branch(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    spread, shrink = rng.uniform(0.2, 0.8), rng.uniform(0.6, 0.85)
    tips = [(np.array([middle, middle + radius * 0.95]), -np.pi / 2 + rng.uniform(-0.2, 0.2), radius * 0.55, radius * 0.12)]
    for _ in range(int(rng.integers(3, 7))):
        grown = []
        for spot, angle, length, thick in tips:
            end = spot + length * rng.uniform(0.7, 1.1) * np.array([np.cos(angle), np.sin(angle)])
            end = middle + (end - middle) * min(1.0, radius / max(float(np.hypot(*(end - middle))), 1e-6))
            _lines(mask, [np.stack([spot, end])], max(1, round(thick)))
            for side in (-1, 1):
                turn = side * spread * rng.uniform(0.4, 1.4)
                grown.append((end, angle + turn, length * shrink * rng.uniform(0.7, 1.1), thick * 0.65))
        tips = grown


def _draw_wires(rng: np.random.Generator, mask: np.ndarray, middle: float, radius: float) -> None:
    for _ in range(int(rng.integers(1, 5))):
        x = np.linspace(-1, 1, 40)
        bends = [rng.uniform(-0.4, 0.4) / k * np.sin(k * np.pi * x + rng.uniform(0, 7)) for k in range(1, 5)]
        y = rng.uniform(-0.3, 0.3) + np.sum(bends, axis=0)
        spots = np.stack([x, y], axis=1) / np.maximum(1, np.hypot(x, y))[:, None]
        turn = rng.uniform(0, np.pi)
        spots = spots @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        _lines(mask, [middle + radius * spots], max(1, round(radius * rng.uniform(0.01, 0.06))))


COMPACT: dict[str, Callable[[np.random.Generator, np.ndarray, float, float], None]] = {
    "blob": _draw_blob,
    "polygon": _draw_polygon,
    "box": _draw_box,
    "ellipse": _draw_ellipse,
    "ring": _draw_ring,
    "wheel": _draw_wheel,
    "branch": _draw_branch,
    "wires": _draw_wires,
}


def _polar(middle: float, radii: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return middle + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _fix(value: float) -> int:
    """Return a coordinate for OpenCV's drawing: an integer in units of 1/16 pixel, in which whole pixels are pixel centres."""
    return round(value * 2**_BITS)


def _fill(mask: np.ndarray, outline: np.ndarray) -> None:
    cv2.fillPoly(mask, [np.rint(outline * 2**_BITS).astype(np.int32)], 255, cv2.LINE_AA, _BITS)


def _lines(mask: np.ndarray, lines: list[np.ndarray], thick: int) -> None:
    fixed = [np.rint(line * 2**_BITS).astype(np.int32) for line in lines]
    cv2.polylines(mask, fixed, False, 255, thick, cv2.LINE_AA, _BITS)
