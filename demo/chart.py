"""Curves as SVG inside the page, in its colours and at any width."""

import html
import math
from collections.abc import Sequence

from crossflow.engine.curves import Panel

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 22
COLOURS = ("#1c908a", "#d9623b", "#5b6fd6", "#b58a1b", "#a34d8f", "#6b8f3a", "#888078", "#2f7fb5")
MAX_POINTS = 400
"""Of a line; more are thinned out evenly."""


def charts(panels: Sequence[Panel], labels: Sequence[str], x: str) -> str:
    """A legend of the runs and a small chart for each panel."""
    keys = "".join(f'<span style="--line:{_colour(labels, label)}">{html.escape(label)}</span>' for label in labels)
    figures = "".join(_figure(panel, labels, x) for panel in panels)
    return f'<div class="legend">{keys}</div><div class="charts">{figures}</div>'


def _colour(labels: Sequence[str], label: str) -> str:
    return COLOURS[list(labels).index(label) % len(COLOURS)]


def _figure(panel: Panel, labels: Sequence[str], x: str) -> str:
    points = [point for line in panel.lines.values() for point in line]
    logarithmic = panel.is_logarithmic
    left, right = _bounds([at for at, _ in points])
    low, high = _bounds([math.log10(y) if logarithmic else y for _, y in points])

    def place(at: float, y: float) -> tuple[float, float]:
        level = math.log10(y) if logarithmic else y
        return (
            LEFT + (at - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            TOP + (high - level) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    lines = []
    for label, line in panel.lines.items():
        colour, places = _colour(labels, label), [place(*point) for point in _thinned(line)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        lines.append(f'<polyline points="{path}" stroke="{colour}"/>')
        if len(places) < 12:
            lines += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.4" fill="{colour}"/>' for a, b in places]
    title = f"{panel.name}{' (logarithmic)' if logarithmic else ''}"
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title, quote=True)}">'
        f"{_axes(left, right, low, high, logarithmic)}{''.join(lines)}"
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{right:.4g} {html.escape(x)}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 4}">{left:.4g}</text></svg></figure>'
    )


def _axes(left: float, right: float, low: float, high: float, logarithmic: bool) -> str:
    """Three horizontal lines with their values."""
    rows = []
    for share in (0.0, 0.5, 1.0):
        level, y = high - share * (high - low), TOP + share * (HEIGHT - TOP - BOTTOM)
        value = 10**level if logarithmic else level
        rows.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{y + 3:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    return "".join(rows)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and largest value, apart even if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every k-th point, and the last one."""
    every = math.ceil(len(points) / MAX_POINTS)
    return [*points[: len(points) - 1 : every], points[-1]]
