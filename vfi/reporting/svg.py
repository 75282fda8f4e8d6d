"""Line, scatter and labelled charts as inline SVG, coloured by the page's CSS.

Classes: `c0` … `c5` are the colours of the series, `grid`, `axis`, `rule` and `label` the rest. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = 6
WIDTH, HEIGHT = 360, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 24, 36
_LINE_HEIGHT, _LABEL_SIGNS = 13, 24


class Series(NamedTuple):
    """A named list of (x, y, tooltip)."""

    name: str
    points: Sequence[tuple[float, float, str]]


class _Axis(NamedTuple):
    """Map from values to pixels: linear, or logarithmic if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        value, low, high = (math.log(v) if self.log else v for v in (value, self.low, self.high))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Return about `count` round values (1, 2 or 5 times a power of ten apart) within low … high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten within low … high, only powers of ten over more than two decades."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) <= 2 else (1,)
    ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
    return ticks if len(ticks) >= 3 else nice_ticks(low, high)


def thin(points: Sequence[tuple[float, float, str]], most: int = 300) -> list[tuple[float, float, str]]:
    """Reduce to at most `most` points: neighbours are averaged, the last point is kept unchanged."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most - 1))
    blocks = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    means = [(sum(p[0] for p in block) / len(block), sum(p[1] for p in block) / len(block), "") for block in blocks]
    return [*means, points[-1]]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    rules: Sequence[tuple[str, float]] = (),
) -> str:
    """Draw lines over a shared x; `rules` are named horizontal lines. Values must be finite, and positive for `log`."""
    xs = [x for _, points in series for x, _, _ in points]
    ys = [y for _, points in series for _, y, _ in points] + [y for _, y in rules]
    x_axis, y_axis = _axes((min(xs), max(xs)), _padded(min(ys), max(ys), log), log_y=log)
    body = [_frame(x_axis, y_axis, x_label, y_label)]
    for name, value in rules:
        y = y_axis(value)
        body.append(f'<line class="rule" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="label" x="{WIDTH - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(name)}</text>')
    for number, (_, points) in enumerate(series):
        colour = f"c{number % COLOURS}"
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y, _ in points)
        body.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(points) <= 40:
            body += [_dot(x_axis(x), y_axis(y), 2.6, colour, text) for x, y, text in points]
    return _svg(title, body)


def scatter_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Draw points on two axes of the same range, with the diagonal x = y."""
    values = [v for _, points in series for x, y, _ in points for v in (x, y)]
    span = _padded(min(values), max(values), False)
    x_axis, y_axis = _axes(span, span)
    body = [_frame(x_axis, y_axis, x_label, y_label)]
    (low, high) = span
    body.append(
        f'<line class="rule" x1="{x_axis(low):.1f}" y1="{y_axis(low):.1f}" x2="{x_axis(high):.1f}" y2="{y_axis(high):.1f}"/>'
    )
    for number, (_, points) in enumerate(series):
        body += [_dot(x_axis(x), y_axis(y), 3, f"point c{number % COLOURS}", text) for x, y, text in points]
    return _svg(title, body)


def labelled_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Draw a few points with the names of their series next to them, over a logarithmic x, which must be positive."""
    points = [(number, name, point) for number, (name, found) in enumerate(series) for point in found]
    xs, ys = [x for _, _, (x, _, _) in points], [y for _, _, (_, y, _) in points]
    x_axis, y_axis = _axes(_padded(min(xs), max(xs), True), _padded(min(ys), max(ys), False), log_x=True)
    body, lowest = [_frame(x_axis, y_axis, x_label, y_label)], math.inf
    for number, name, (x, y, text) in sorted(points, key=lambda point: point[2][1]):  # upwards: a label may make room
        at, height = x_axis(x), y_axis(y)
        lowest = min(height + 3.5, lowest - _LINE_HEIGHT)
        side, anchor = (-8, "end") if at > (_LEFT + WIDTH - _RIGHT) / 2 else (8, "start")
        short = name if len(name) <= _LABEL_SIGNS else f"{name[: _LABEL_SIGNS - 1]}…"
        body.append(_dot(at, height, 4.5, f"c{number % COLOURS}", text))
        body.append(f'<text class="name" x="{at + side:.1f}" y="{lowest:.1f}" text-anchor="{anchor}">{escape(short)}</text>')
    return _svg(title, body)


def legend(names: Sequence[str]) -> str:
    """Render the names of the series with their colours; nothing for fewer than two."""
    if len(names) < 2:
        return ""
    items = "".join(f'<li><i class="swatch c{i % COLOURS}"></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def _axes(x: tuple[float, float], y: tuple[float, float], *, log_x: bool = False, log_y: bool = False) -> tuple[_Axis, _Axis]:
    x = x if x[1] > x[0] else (x[0] - 1, x[0] + 1)
    return _Axis(*x, _LEFT, WIDTH - _RIGHT, log_x), _Axis(*y, HEIGHT - _BOTTOM, _TOP, log_y)


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    """Return the range with some room on both sides."""
    if log:
        room = max((high / low) ** 0.06, 1.1)
        return low / room, high * room
    room = max(0.06 * (high - low), 1e-3 * abs(high), 1e-6)
    return low - room, high + room


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    """Draw grid, ticks and names of both axes."""
    parts = []
    for value in _ticks(x_axis):
        x = x_axis(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text class="label" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(y_axis):
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="label" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text class="axis" x="{(_LEFT + WIDTH) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="0" y="11">{escape(y_label)}</text>')
    return "".join(parts)


def _ticks(axis: _Axis) -> list[float]:
    return log_ticks(axis.low, axis.high) if axis.log else nice_ticks(axis.low, axis.high)


def _dot(x: float, y: float, radius: float, colour: str, text: str) -> str:
    return f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(text)}</title></circle>'


def _svg(title: str, body: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
