"""Charts as SVG text: lines and stacked areas over an axis, with a title that screen readers read.

Colours come from the page, by class (`c-NAME` as fill or stroke). Knows numbers and names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

# (x, y); a y that is None or not finite breaks a line: nothing was measured in between.
Points = Sequence[tuple[float, float | None]]
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 900, 76, 12, 18, 34


@dataclass(frozen=True)
class Series:
    """name: shown; colour: the page's class. dashed: for a limit rather than a measurement; dots:
    where the points are few and each is a measurement.
    """

    name: str
    colour: str
    points: Points
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a word above it; `other` shades it darker."""

    start: float
    stop: float
    name: str
    other: bool = False


def ticks(maximum: float, base: int = 10, most: int = 5) -> list[float]:
    """Round numbers from 0 to at least `maximum`; base 1024 for bytes."""
    if maximum <= 0:
        return [0.0, 1.0]
    unit = base ** math.floor(math.log(maximum, base))
    steps = (1, 2, 5) if base == 10 else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    sizes = [unit / base * s for s in steps] + [unit * s for s in steps] + [unit * base]
    step = next(size for size in sizes if maximum / size <= most)
    return [step * n for n in range(math.ceil(maximum / step) + 1)]


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_format: Callable[[float], str],
    x_format: Callable[[float], str] = lambda x: f"{x:g}",
    x_max: float | None = None,
    stacked: bool = False,
    bands: Sequence[Band] = (),
    base: int = 10,
    height: int = 210,
) -> str:
    """One figure. stacked: areas on top of each other; all series then have the same x values."""
    drawn = _stack(series) if stacked else [(s, [], list(s.points)) for s in series]
    xs = [x for _, _, points in drawn for x, _ in points]
    ys = [y for _, _, points in drawn for _, y in points if _is_shown(y)]
    y_ticks = ticks(max(ys, default=0.0), base)
    span = x_max or max(xs, default=0.0) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, x / span),
            height - _BOTTOM - (height - _BOTTOM - _TOP) * y / y_ticks[-1],
        )

    out = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    for band in bands:
        (left, _), (right, _) = at(band.start, 0), at(band.stop, 0)
        shade = "band other" if band.other else "band"
        out.append(
            f'<rect class="{shade}" x="{left:.1f}" y="{_TOP}" width="{max(0.5, right - left):.1f}" '
            f'height="{height - _BOTTOM - _TOP}"/>'
        )
        if right - left > 7 * len(band.name):
            out.append(_text(left + 4, _TOP - 5, band.name, "start"))
    for y in y_ticks:
        _, py = at(0, y)
        out.append(f'<path class="grid" d="M{_LEFT} {py:.1f}H{_WIDTH - _RIGHT}"/>')
        out.append(_text(_LEFT - 8, py + 4, y_format(y), "end"))
    for x in ticks(span, most=8):
        if x <= span * 1.0001:
            out.append(_text(at(x, 0)[0], height - _BOTTOM + 16, x_format(x), "middle"))
    out.append(_text(_WIDTH - _RIGHT, height - 4, x_name, "end"))
    for s, lower, upper in drawn:
        runs = _runs(upper)
        for run in runs:
            line = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in run)
            if stacked:
                back = "L".join("{:.1f} {:.1f}".format(*at(*point)) for point in reversed(lower))
                out.append(f'<path class="area c-{s.colour}" d="M{line}L{back}Z"/>')
            else:
                dashes = ' stroke-dasharray="6 5"' if s.dashed else ""
                out.append(f'<path class="line c-{s.colour}" d="M{line}"{dashes}/>')
        # A line of one point would not be seen.
        for point in [p for run in runs if s.dots or len(run) == 1 for p in run]:
            x, y = at(*point)
            label = f"{s.name}: {y_format(point[1])} at {x_format(point[0])}"
            out.append(
                f'<circle class="dot c-{s.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                f"<title>{escape(label)}</title></circle>"
            )
    return "".join([*out, "</svg>"])


def bar(parts: Sequence[tuple[str, float]], total: float) -> str:
    """Parts of a whole, side by side; what is left of `total` stays empty."""
    total = max(total, sum(size for _, size in parts)) or 1.0
    out, left = [f'<svg class="bar" viewBox="0 0 {_WIDTH} 22" preserveAspectRatio="none">'], 0.0
    out.append(f'<rect class="band" x="0" y="0" width="{_WIDTH}" height="22"/>')
    for number, (name, size) in enumerate(parts):
        width = _WIDTH * size / total
        out.append(
            f'<rect class="p{number % 8}" x="{left:.2f}" y="0" width="{width:.2f}" height="22">'
            f"<title>{escape(name)}</title></rect>"
        )
        left += width
    return "".join([*out, "</svg>"])


def _stack(series: Sequence[Series]) -> list[tuple[Series, list, list]]:
    """(series, lower edge, upper edge), each on the one before."""
    below = [(x, 0.0) for x, _ in series[0].points] if series else []
    found = []
    for s in series:
        upper = [(x, (y or 0.0) + y0) for (x, y), (_, y0) in zip(s.points, below, strict=True)]
        found.append((s, below, upper))
        below = upper
    return found


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    """The pieces of a line between its breaks."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if _is_shown(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _is_shown(y: float | None) -> TypeGuard[float]:
    return y is not None and math.isfinite(y)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
