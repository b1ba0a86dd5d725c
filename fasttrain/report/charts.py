"""Charts as SVG. Unlike matplotlib's, they are small, follow the page's colours and show values on hover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

NOTHING = "\N{EN DASH}"
"""Shown for a missing value."""
WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 10, 32
_POINTS = 400  # largest number of points per line
_TINY = 1e-12  # smaller differences count as 0
_DOTTED = 12  # a line with at most this number of points gets a dot for each
_HOVERED = 60  # largest number of points per line that show their values

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve. ``style`` is a class of the page's style sheet with its colour and dashes."""

    name: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Level:
    """A constant, drawn across the whole chart."""

    name: str
    value: float
    style: str


def line_chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    *,
    x_label: str = "epoch",
    unit: str = "",
    band: bool = False,
) -> Markup:
    """Return an SVG of lines with finite points, over an x axis that starts at 0; empty without points.

    With ``band``, the area where the first line is above the second is shaded. Long lines are thinned and keep their
    extremes.
    """
    lines = [Line(line.name, thin(line.points, _POINTS), line.style) for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [level.value for level in levels]
    (x0, x1), (y0, y1) = _span([0.0, *xs], 0.0), _span(ys, 0.06)

    def at(x: float, y: float) -> Point:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(at, (x0, x1), (y0, y1), x_label)]
    if band and len(lines) > 1:
        (xs_above, ys_above), below = zip(*lines[0].points, strict=True), lines[1].points
        edge = [(x, min(y, float(np.interp(x, xs_above, ys_above)))) for x, y in below]
        outline = [*lines[0].points, *reversed(edge)]
        parts.append(f'<path class="band" d="{_path([at(*point) for point in outline])}Z"/>')
    for level in levels:
        (left, y), (right, _) = at(x0, level.value), at(x1, level.value)
        path = f'<path class="line {level.style}" d="{_path([(left, y), (right, y)])}"/>'
        parts.append(f"<g>{_title(f'{level.name}: {number(level.value)}{unit}')}{path}</g>")
    for line in lines:
        places = [at(*point) for point in line.points]
        parts.append(f'<path class="line {line.style}" d="{_path(places)}"/>')
        if len(places) <= _DOTTED:
            parts += [f'<circle class="dot {line.style}" cx="{u:.1f}" cy="{v:.1f}" r="3"/>' for u, v in places]
        parts += [_hover(line.name, point, at(*point), x_label, unit) for point in thin(line.points, _HOVERED)]
    ends = [f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}{unit}" for line in lines]
    summary = "; ".join([*ends, *(f"{level.name} {number(level.value)}{unit}" for level in levels)])
    return picture(f"{title}. {summary}.", "".join(parts))


def picture(label: str, content: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """Return an SVG that screen readers treat as one picture with this label."""
    size = f'viewBox="0 0 {width} {height}"'
    return Markup(f'<svg {size} role="img" aria-label="{escape(label)}">{content}</svg>')


def sample(style: str) -> Markup:
    """Return a short piece of a line, or of the band, for a legend."""
    piece = '<path class="band" d="M0 0H34V10H0Z"/>' if style == "band" else f'<path class="line {style}" d="M0 5H34"/>'
    return Markup(f'<svg class="sample" viewBox="0 0 34 10" aria-hidden="true">{piece}</svg>')


def number(value: float) -> str:
    """Return a number as text, with at most four significant digits and commas between thousands."""
    if not math.isfinite(value):
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-")


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most ``most`` (4 or more) points: first, last, and the lowest and the highest of each interval."""
    if len(points) <= most:
        return list(points)
    count = (most - 2) // 2
    kept = {0, len(points) - 1}
    for k in range(count):
        start, stop = (1 + (len(points) - 2) * n // count for n in (k, k + 1))
        interval = range(start, stop)
        kept |= {min(interval, key=lambda i: points[i][1]), max(interval, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _span(values: Sequence[float], margin: float) -> Point:
    """Return the ends of an axis: the smallest and largest value with a margin, and never the same value twice."""
    low, high = min(values), max(values)
    room, top = (high - low) * margin, max(abs(low), abs(high))
    if high - low <= max(1e-9 * top, _TINY):
        room = 0.5 * top if top > _TINY else 0.5
    return low - room, high + room


def _axes(at: object, x_span: Point, y_span: Point, x_label: str) -> str:
    assert callable(at)
    parts = []
    y_ticks = ticks(*y_span)
    for y, text in zip(y_ticks, _labels(y_ticks), strict=True):
        _, v = at(x_span[0], y)
        parts.append(f'<path class="rule" d="M{_LEFT} {v:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 5}" y="{v + 3.5:.1f}" text-anchor="end">{text}</text>')
    x_ticks, floor = ticks(*x_span), HEIGHT - _BOTTOM
    for x, text in zip(x_ticks, _labels(x_ticks), strict=True):
        u, _ = at(x, y_span[0])
        parts.append(f'<path class="axis" d="M{u:.1f} {floor}v4"/>')
        parts.append(f'<text class="tick" x="{u:.1f}" y="{floor + 15}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {floor}H{WIDTH - _RIGHT}"/>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _labels(values: Sequence[float]) -> list[str]:
    """Return ticks as text, with enough decimals to distinguish neighbours, or as powers of ten."""
    step = min((b - a for a, b in pairwise(values)), default=1.0)
    top = max((abs(v) for v in values), default=0.0)
    if top and (top < 1e-3 or top >= 1e6):
        return [f"{v:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e") if v else "0" for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v + 0.0:,.{decimals}f}" for v in values]


def _path(places: Sequence[Point]) -> str:
    return "M" + "L".join(f"{u:.1f} {v:.1f}" for u, v in places)


def _hover(name: str, point: Point, place: Point, x_label: str, unit: str) -> str:
    """Return an invisible circle that shows a point's value on hover."""
    text = f"{name}, {x_label} {number(point[0])}: {number(point[1])}{unit}"
    return f'<circle class="hover" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="7">{_title(text)}</circle>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
