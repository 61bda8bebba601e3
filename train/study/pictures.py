"""The picture of training cost against loss, every row a point, and the strip of clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from data.io.files import beside
from train.report.charts import COLOURS, STYLE, svg
from train.report.pictures import film_strip
from train.study.results import RowResult

COST, STRIP = "cost.png", "clips.png"


def cost_figure(results: Sequence[RowResult], last: str) -> Figure | None:
    """Attention's GFLOPs in a forward of one clip across, the loss at the longest length up; None without a point."""
    points = [(one, one.gflops, one.loss(last)) for one in results if one.row.tuned]
    known = [(one, cost, loss) for one, cost, loss in points if cost is not None and loss is not None]
    if not known:
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (one, cost, loss) in enumerate(known):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([cost], [loss], "o", color=colour)
        axes.annotate(one.row.words, (cost, loss), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("self-attention, GFLOPs in a forward of one clip")
    axes.set_ylabel(f"flow loss at {last}, tuned")
    axes.grid(alpha=0.25)
    return figure


def draw(results: Sequence[RowResult], last: str, panels: dict[str, Tensor], title: str, out: Path) -> str:
    """Writes the pictures that there are figures for; returns the first as SVG for the page, "" without one.

    Those of a command with other settings are removed: they show other rows.
    """
    if len(panels) < 2:
        (out / STRIP).unlink(missing_ok=True)
    else:
        with beside(out / STRIP) as fresh, fresh.open("wb") as file:
            film_strip(panels, title, file)
    figure = cost_figure(results, last)
    if figure is None:
        (out / COST).unlink(missing_ok=True)
        return ""
    with beside(out / COST) as fresh:
        figure.savefig(fresh, dpi=130, format="png")
    with matplotlib.rc_context(STYLE):
        drawn = cost_figure(results, last)
        assert drawn is not None
        return svg(drawn, "training cost against loss")
