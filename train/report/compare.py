"""Several runs on one page: their results with intervals over seeds, their curves over each other, what differs."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from train.measures.losses import Interval
from train.report.charts import COLOURS, Line, line_chart
from train.report.document import facts, section, table, write_document
from train.report.page import PAGE
from train.report.runs import FIGURES, LOSSES, Group, Points, Run, differing, grouped, series, smoothed


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Writes the page of several runs and returns its file.

    Args:
        out: the file, or a folder for a ``report.html`` in it.

    Raises:
        UserError: it cannot be written.
    """
    groups = grouped(runs)
    confs = ", ".join(dict.fromkeys(run.config.conf for run in runs))
    states = [run.state[0] for run in runs]
    counts = [(word, str(states.count(word))) for word in dict.fromkeys(states)]
    parts = [
        f"<h1>{html.escape(confs)} <small>{len(runs)} runs compared</small></h1>",
        facts(counts),
        section("Results", _results(groups)),
        section("Curves", f'<div class="charts">{"".join(_charts(groups))}</div>'),
        section("Runs", _runs(runs)),
    ]
    return write_document(f"{confs}: {len(runs)} runs", parts, out / PAGE if out.is_dir() else out)


def print_comparison(runs: Sequence[Run]) -> None:
    """Prints the table of results: a row for runs that differ by their seed alone."""
    head, rows = comparison(grouped(runs))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        first, *others = (cell.ljust(width) if not at else cell.rjust(width)
                          for at, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        print("  ".join([first, *others]).rstrip())


def comparison(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """The table of results as text, its head and its rows."""
    named = [name for name in FIGURES if any(group.figure(name) is not None for group in groups)]
    loss = next((name for name in LOSSES if name in named), None)
    paired = len(groups) > 1 and loss is not None and any(g.minus(groups[0], loss) is not None for g in groups[1:])
    head = ["settings", "runs done", *named, *([f"{loss} minus the first row's"] if paired else [])]
    rows = []
    for group in groups:
        done = sum(run.state[0] == "done" for run in group.runs)
        row = [group.label, f"{done} of {len(group.runs)}", *(_figure(name, group.figure(name)) for name in named)]
        rows.append([*row, *([str(group.minus(groups[0], loss) or "")] if paired and loss is not None else [])])
    return head, rows


def _figure(name: str, value: Interval | float | None) -> str:
    if value is None:
        return ""
    form = ".4f" if name in LOSSES else ",.3g"
    if isinstance(value, float):
        return format(value, form)
    return f"{value.mean:{form}} ± {value.half:{form}}"


def _results(groups: Sequence[Group]) -> str:
    head, rows = comparison(groups)
    cells = [[html.escape(cell) for cell in row] for row in rows]
    for number, row in enumerate(cells):
        row[0] = _key(number) + row[0]
    several = any(len(group.runs) > 1 for group in groups)
    text = (
        "<p>Runs that differ by their seed alone are one row: the mean over the seeds that have the figure, and "
        "Student's 95 % interval; differences are paired over seeds.</p>"
    )
    return table([html.escape(cell) for cell in head], cells) + (text if several else "")


def _key(number: int) -> str:
    return f'<i class="key" style="background:{COLOURS[number % len(COLOURS)]}"></i>'


def _charts(groups: Sequence[Group]) -> Iterator[str]:
    """The colours are those of the table of results; several seeds are pale, with their mean drawn over them."""
    for title, key, smooth in (
        ("training loss, running mean", "loss", True),
        ("validation loss", "validation/loss", False),
        ("gradient norm, running mean", "grad_norm", True),
        ("seconds a step", "step_seconds", False),
    ):
        lines: list[Line] = []
        for number, group in enumerate(groups):
            curves = [series(run.rows, key) for run in group.runs]
            curves = [smoothed(curve) if smooth else curve for curve in curves if curve]
            lines += [Line(curve, colour=number, faint=len(curves) > 1) for curve in curves]
            if len(curves) > 1:
                lines.append(Line(_mean(curves), colour=number))
        yield line_chart(title, lines)


def _mean(curves: Sequence[Points]) -> Points:
    """The mean at the steps that every curve has."""
    values = [dict(curve) for curve in curves]
    shared = sorted(set(values[0]).intersection(*values[1:]))
    return [(step, fmean(each[step] for each in values)) for step in shared]


def _runs(runs: Sequence[Run]) -> str:
    """Every run by itself: where it is, how it stands, the settings that are its own, its best evidence."""
    changes = differing(runs)
    keys = list(dict.fromkeys(key for each in changes for key in each))
    rows = []
    for run, own in zip(runs, changes, strict=True):
        word, why = run.state
        state = html.escape(f"{word}: {why}" if why and word in ("failed", "died") else word)
        row = [run.name, *(own.get(key, "") for key in keys), run.result, str(run.folder)]
        cells = [html.escape(cell) for cell in row]
        rows.append([*cells[:-1], f'<span class="bad">{state}</span>' if ":" in state else state, cells[-1]])
    return table(["run", *map(html.escape, keys), "result", "state", "folder"], rows)
