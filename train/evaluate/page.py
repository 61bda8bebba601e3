"""The evaluation as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from train.evaluate.clips import Made
from train.evaluate.results import MEASURES, Row, cells, tuned_of
from train.evaluate.settings import Job
from train.report.charts import COLOURS, STYLE, svg
from train.report.document import facts, section, table, write_document

_ABOUT = {
    "repetition": "share of the later frames that an earlier stretch explains: 1 is a loop",
    "frozen": "share of the steps between frames in which nothing moves",
    "consistency": "how alike neighbouring frames are: 0 is noise, 1 a still",
    "worst_step": "the same of the two that are least alike: a cut lies below 0",
    "drift": "of the mean colour from the first eighth to the last, in standard deviations of a frame",
    "trend": "the steady part of it",
}


def write_page(
    job: Job,
    rows: Sequence[Row],
    levels: Sequence[float],
    notes: Sequence[str],
    clips: Sequence[tuple[Row, Sequence[Made]]],
) -> None:
    """Writes ``report.html``.

    Raises:
        UserError: the file cannot be written.
    """
    title = f"Evaluation of {job.config.conf}"
    head, *body = [[html.escape(cell) for cell in line] for line in cells(rows)]
    missing = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    named = "".join(f"<li><b>{name}</b>: {html.escape(_ABOUT[name])}</li>" for name in MEASURES)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        facts(
            [
                ("run", str(job.given.run)),
                ("LoRA", "the run's own" if job.lora is None else f"{job.lora[0].name} at {job.lora[1]:g}"),
                ("temporal positions in every row", job.config.model.rope),
                ("steps", str(job.steps)),
                ("guidance", ", ".join(f"{weight:g}" for weight in job.guidance)),
                ("± is half of a 95 % interval", "over clips"),
            ]
        ),
        section("Results", table(head, body) + f"<ul>{named}</ul>"),
        section("Not measured", f"<ul>{missing}</ul>" if missing else ""),
        section("Loss by noise level", _losses(rows, levels)),
        section("Measures by length", _measures(rows)),
        section("Clips", "".join(_strips(row, made) for row, made in clips)),
    ]
    write_document(title, parts, job.out / "report.html")


def _losses(rows: Sequence[Row], levels: Sequence[float]) -> str:
    """For each length the difference to the tuned model's loss at each noise level, with intervals."""
    times = sorted({row.times for row in rows if row.losses is not None})
    if not times:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(times), 3.4), layout="constrained")
        panels = figure.subplots(1, len(times), squeeze=False)[0]
        for axes, length in zip(panels, times, strict=True):
            tuned = tuned_of(rows, length)
            axes.axhline(0, color=COLOURS[9], linewidth=1, linestyle=":")
            for number, row in enumerate(row for row in rows if row.times == length and row.losses is not None):
                found = [row.minus(tuned, i) for i in range(len(levels))]
                if row is not tuned:
                    means, halves = ([getattr(one, part) for one in found] for part in ("mean", "half"))
                    axes.errorbar(
                        levels, means, halves, color=COLOURS[number % len(COLOURS)], marker="o", markersize=4,
                        linewidth=1.4, capsize=2, label=row.name,
                    )  # fmt: skip
            axes.set(xlabel="noise level", ylabel="loss above the tuned model's", title=f"{length}x")
            axes.grid(axis="y")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)
        return f"<figure>{svg(figure, 'Loss by noise level')}</figure>"


def _measures(rows: Sequence[Row]) -> str:
    """A chart for each measure: its mean over clips at each length, a line for each row."""
    names = [
        name for name in dict.fromkeys(row.name for row in rows) if any(r.measures for r in rows if r.name == name)
    ]
    if not names:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        for axes, measure in zip(figure.subplots(2, 3).flat, MEASURES, strict=True):
            for number, name in enumerate(names):
                points = [(row.times, row.measure(measure)) for row in rows if row.name == name]
                found = [(times, one.mean) for times, one in points if one is not None]
                axes.plot(*zip(*found, strict=True), color=COLOURS[number % len(COLOURS)], marker="o", label=name)
            axes.set(title=measure, xlabel="length, of the model's own")
            axes.set_xticks(sorted({row.times for row in rows}))
            axes.grid(axis="y")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return f"<figure>{svg(figure, 'Measures by length')}</figure>"


def _strips(row: Row, made: Sequence[Made]) -> str:
    found = ""
    for clip in made:
        if clip.strip.exists():
            data = base64.b64encode(clip.strip.read_bytes()).decode()
            caption = html.escape(f"{row.name}, {row.times}x: {clip.prompt}")
            found += (
                f"<figure><figcaption>{caption}</figcaption>"
                f'<img src="data:image/png;base64,{data}" alt="{caption}"></figure>'
            )
    return found
