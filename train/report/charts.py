"""Line charts as SVG text, for a page that needs nothing beside itself."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 30
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: values from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (self._scaled(each) for each in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """A handful of round values."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Mapping[str, Points], *, log: bool = False, faint: Sequence[str] = ()) -> str:
    """A figure with a line for each entry, over steps; points that are not finite are left out. Empty without points.

    Args:
        log: a logarithmic vertical axis, where the values are positive and of several orders of magnitude.
        faint: lines that are drawn thin and pale, behind the others.
    """
    kept = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in lines.items()}
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    log = log and min(ys) > 0 and max(ys) / min(ys) > 10  # less shows better on a plain axis
    across = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, _LEFT, WIDTH - _RIGHT)
    up = Axis(*_padded(min(ys), max(ys), log), HEIGHT - _BOTTOM, _TOP, log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{value:.6g}</text>')
    legend = []
    for number, (name, points) in enumerate(kept.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in _thinned(points))
        style = "opacity:.35;stroke-width:1" if name in faint else ""
        parts.append(
            f'<polyline points="{path}" stroke="{colour}" style="{style}"><title>{html.escape(name)}</title></polyline>'
        )
        if len(points) == 1:
            x, y = across.place(points[0][0]), up.place(points[0][1])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        legend.append(f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>')
    parts.append("</svg>")
    caption = f'<div class="legend">{"".join(legend)}</div>' if len(kept) > 1 else ""
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{''.join(parts)}{caption}</figure>"


def smoothed(points: Points) -> list[tuple[float, float]]:
    """The running mean, each new value with a share of a tenth; values that are not finite leave it as it is."""
    found: list[tuple[float, float]] = []
    mean: float | None = None
    for x, y in points:
        if math.isfinite(y):
            mean = y if mean is None else mean + 0.1 * (y - mean)
        if mean is not None:
            found.append((x, mean))
    return found


def _padded(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return (low / 1.1, high * 1.1)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _thinned(points: Points, most: int = 1200) -> Points:
    """Every so-manieth point of a long line, and the last."""
    step = max(1, len(points) // most)
    return points if step == 1 else [*points[::step], points[-1]]
