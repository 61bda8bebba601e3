"""Line charts through matplotlib, as SVG that stands in a page: text and axes take the page's own colours."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]

COLOURS = ("#3b82c4", "#e0622f", "#2f9e62", "#9a6bd0", "#c9a227", "#1aa3b5", "#d0568f", "#8a7a6a", "#6f8f2f", "#7f8794")
"""Of the lines: each reads on white and on near-black."""
INK = "#010203"  # stands for the page's text colour, which a matplotlib colour cannot name
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: they can be searched, and take the page's font
    "svg.hashsalt": "radial",  # the same chart gives the same text
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
"""matplotlib's settings for what `svg` puts into a page."""
_SURPLUS = (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"font-family:[^;]*; ", r' transform="rotate\(-0 [^"]*"')
"""In matplotlib's SVG: what a page has for all of its charts, or has no use for."""
_SIZE = (5.6, 2.9)  # inches


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        points: (x, y); those with a y that is not finite are left out.
        name: in the legend; "" for none.
        colour: a number, the same for lines that belong together.
        faint: thin and pale, behind the others.
    """

    points: Points
    name: str = ""
    colour: int = 0
    faint: bool = False


def line_chart(title: str, lines: Sequence[Line], *, log: bool = False, across: str = "step") -> str:
    """A figure with its lines, as HTML; empty where no line has a point.

    Args:
        log: a logarithmic vertical axis, where the values are positive and of several orders of magnitude.
        across: what the horizontal axis counts, in whole numbers.
    """
    kept = [(line, [(x, y) for x, y in line.points if math.isfinite(y)]) for line in lines]
    kept = [(line, points) for line, points in kept if points]
    if not kept:
        return ""
    ys = [y for _, points in kept for _, y in points]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        for line, points in kept:
            axes.plot(
                *zip(*_thinned(points), strict=True),
                color=COLOURS[line.colour % len(COLOURS)],
                linewidth=1.0 if line.faint else 1.7,
                alpha=0.5 if line.faint else 1.0,
                zorder=2 if line.faint else 3,
                marker="o" if len(points) == 1 else None,
                markersize=4,
                label=line.name or "_",  # which a legend leaves out
            )
        if log and min(ys) > 0 and max(ys) / min(ys) > 10:  # less shows better on a plain axis
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_xlabel(across)
        axes.grid(axis="y")
        named = [line for line, _ in kept if line.name]
        if len(named) > 1:
            axes.legend(frameon=False, fontsize=10, ncols=1 + (len(named) > 5))
        drawing = svg(figure, title)
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{drawing}</figure>"


def lines_of(named: Mapping[str, Points]) -> list[Line]:
    """A line for each entry, in colours of their own."""
    return [Line(points, name, number) for number, (name, points) in enumerate(named.items())]


def svg(figure: Figure, title: str) -> str:
    """A figure as an ``<svg>`` element for HTML, without what only a file of its own needs."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for surplus in _SURPLUS:
        text = re.sub(surplus, "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    inside = text[text.index(">") + 1 :]
    return f'<svg {box[0]} role="img" aria-label="{html.escape(title, quote=True)}">{inside.strip()}'


def _thinned(points: Points, most: int = 1200) -> Points:
    """At most about ``most`` evenly spaced points of a long line, and its last."""
    step = max(1, len(points) // most)
    return points if step == 1 else [*points[::step], points[-1]]
