"""The table of the study: figures with intervals, paired differences, and what they show in words.

results.json    everything, each clip's losses too
results.csv     the table, one row a line
results.md      the table for a README
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from data.io.files import write_utf8
from train.measures.losses import Interval
from train.study.clips import MEASURES
from train.study.losses import Losses, mean_of_all, mean_over_sigmas
from train.study.rows import CEILING, FLOOR, REFERENCE, Row


@dataclass
class RowResult:
    """What is known of a row.

    Attributes:
        row: what it is.
        state: ``done``; or why figures are missing, in words.
        losses, again: by seed, those of whole clips and of what has to be remembered.
        blocks: share of all blocks that a layer computes, the mean over the layers.
        gflops: of self-attention in one forward of one clip, 1e9 operations.
        seconds: a step, by seed, the median of the run.
        validation: by seed, (optimizer step, loss).
        clips: measures of generated clips.
        frechet: distance of the generated clips from the true ones.
    """

    row: Row
    state: str = "done"
    losses: dict[int, Losses] = field(default_factory=dict)
    again: dict[int, Losses] = field(default_factory=dict)
    blocks: float | None = None
    gflops: float | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    validation: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    clips: list[dict[str, Any]] = field(default_factory=list)
    frechet: float | None = None

    def per_clip(self, length: str, seeds: Sequence[int], *, again: bool = False) -> list[float | None]:
        """Of each clip, the loss, the mean over noise levels and over seeds; None where it has nothing to remember."""
        of = self.again if again else self.losses
        columns = [mean_over_sigmas(of[seed][length]) for seed in seeds]
        return [mean_of_all(column) for column in zip(*columns, strict=True)]

    def loss(self, length: str, *, again: bool = False) -> float | None:
        """The mean over clips, noise levels and seeds."""
        if not self.losses or length not in next(iter(self.losses.values())):
            return None
        values = [v for v in self.per_clip(length, list(self.losses), again=again) if v is not None]
        return fmean(values) if values else None

    def minus(self, other: RowResult, length: str, *, again: bool = False) -> Interval | None:
        """The difference of losses, paired over the clips; over shared seeds, or to the mean over the other's."""
        if other is self or not self.losses or not other.losses:
            return None
        shared = [seed for seed in self.losses if seed in other.losses]
        mine, its = shared or list(self.losses), shared or list(other.losses)
        if not self.row.tuned or not other.row.tuned:
            mine, its = list(self.losses), list(other.losses)
        pairs = zip(self.per_clip(length, mine, again=again), other.per_clip(length, its, again=again), strict=True)
        values = [a - b for a, b in pairs if a is not None and b is not None]
        return Interval.of(values) if len(values) > 1 else None

    def minus_over_seeds(self, other: RowResult, length: str) -> Interval | None:
        """The difference of losses, paired over the seeds; None with fewer than two."""
        shared = [seed for seed in self.losses if seed in other.losses]
        if other is self or len(shared) < 2 or not self.row.tuned:
            return None
        means = [
            [fmean(loss for loss in row.per_clip(length, [seed]) if loss is not None) for seed in shared]
            for row in (self, other)
        ]
        return Interval.of([mine - its for mine, its in zip(*means, strict=True)])

    def measure(self, name: str) -> Interval | None:
        """A measure of the generated clips."""
        values = [clip[name] for clip in self.clips if clip[name] is not None]
        return Interval.of(values) if len(values) > 1 else None

    def measure_minus(self, other: RowResult, name: str) -> Interval | None:
        """The difference of a measure, paired over the clips."""
        its = {clip["clip"]: clip[name] for clip in other.clips}
        pairs = [(clip[name], its.get(clip["clip"])) for clip in self.clips]
        values = [a - b for a, b in pairs if a is not None and b is not None]
        return Interval.of(values) if len(values) > 1 and other is not self else None

    def steps_to(self, other: RowResult) -> int | None:
        """The first step at which the validation loss is at most that of the other row's end; None where there is none.

        Means over the seeds of which both have finished: each seed has validation clips of its own.
        """
        curves = [
            (dict(self.validation[seed]), other.validation[seed][-1][1])
            for seed in self.losses
            if seed in other.losses and self.validation.get(seed) and other.validation.get(seed)
        ]
        if not curves:
            return None
        target = fmean(last for _, last in curves)
        shared = sorted(set.intersection(*(set(curve) for curve, _ in curves)))
        return next((int(step) for step in shared if fmean(curve[step] for curve, _ in curves) <= target), None)


def table(results: Sequence[RowResult], lengths: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The table as text: its head and its rows. A figure that is not there is an empty cell."""
    last = lengths[-1]
    reference = _named(results, REFERENCE)
    head = [
        "attention and training", "blocks", "attention GFLOPs", "s a step", *(f"loss {name}" for name in lengths),
        f"{last} minus {REFERENCE}, over clips", "over seeds", f"remembered, {last}", f"steps to {REFERENCE}'s loss",
        "permanence", "trajectory, px", "repetition", "colour drift", "consistency", "Fréchet", "seeds", "state",
    ]  # fmt: skip
    rows = []
    for one in results:
        minus = None if reference is None else one.minus(reference, last)
        over = None if reference is None else one.minus_over_seeds(reference, last)
        steps = one.steps_to(reference) if reference is not None and one.row.tuned else None
        seconds = fmean(one.seconds.values()) if one.seconds else None
        rows.append([
            one.row.words, _figure(one.blocks, ".1%"), _figure(one.gflops, ",.0f"), _figure(seconds, ".3g"),
            *(_figure(one.loss(name), ".4f") for name in lengths), str(minus or ""), str(over or ""),
            _figure(one.loss(last, again=True), ".4f"), "" if steps is None else str(steps),
            *(_interval(one.measure(name)) for name in MEASURES), _figure(one.frechet, ".4g"),
            str(len(one.losses)) if one.row.tuned and one.losses else "", one.state,
        ])  # fmt: skip
    return head, rows


def conclusions(results: Sequence[RowResult], last: str) -> list[str]:
    """What the numbers show, a sentence for each comparison that they allow."""
    reference, floor = _named(results, REFERENCE), _named(results, FLOOR)
    if reference is None or not reference.losses:
        return []
    found = []
    gap = None if floor is None else floor.minus(reference, last)
    if gap is not None and gap.mean - gap.half <= 0:
        found.append(
            f"Tuned random blocks are not above {REFERENCE} ({gap}): on this base, with these steps, masks cannot be "
            "told apart, and nothing below shows which is better."
        )
    for one in results:
        minus = one.minus(reference, last)
        if minus is None:
            continue
        blocks = "" if one.blocks is None or reference.blocks is None else (
            f" at {one.blocks / reference.blocks:.2f} of its blocks"
        )  # fmt: skip
        found.append(f"At {last} the loss of {one.row.words}{blocks} is {_beside(minus)} that of {REFERENCE}.")
    for name, words in (("permanence", "permanence"), ("trajectory", "trajectory error"), ("repetition", "repetition")):
        for one in results:
            if one.row.name == CEILING or not one.row.tuned:
                minus = one.measure_minus(reference, name)
                if minus is not None:
                    found.append(f"The {words} of {one.row.words} is {_beside(minus)} that of {REFERENCE}.")
    return found


def write_results(results: Sequence[RowResult], lengths: Sequence[str], about: dict[str, Any], out: Path) -> list[str]:
    """Writes the three files, and returns the conclusions."""
    head, rows = table(results, lengths)
    sentences = conclusions(results, lengths[-1])
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    text = ["# The study", "", *(f"{name}: {value}  " for name, value in about.items()), "", *lines, ""]
    write_utf8(out / "results.md", "\n".join([*text, *(f"- {sentence}" for sentence in sentences)]) + "\n")
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([head, *rows])
    write_utf8(out / "results.csv", file.getvalue())
    whole = {
        "about": about,
        "conclusions": sentences,
        "rows": [{**vars(one), "row": asdict(one.row)} for one in results],
    }
    write_utf8(out / "results.json", json.dumps(whole, indent=1) + "\n")
    return sentences


def _named(results: Sequence[RowResult], name: str) -> RowResult | None:
    return next((one for one in results if one.row.name == name), None)


def _beside(difference: Interval) -> str:
    if not math.isfinite(difference.half):
        return "not comparable (a value is not finite) with"
    if abs(difference.mean) <= difference.half:
        return f"not distinguishable ({difference}) from"
    return f"{abs(difference.mean):.4f} ± {difference.half:.4f} {'above' if difference.mean > 0 else 'below'}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(value: Interval | None) -> str:
    return "" if value is None else f"{value.mean:.3f} ± {value.half:.3f}"
