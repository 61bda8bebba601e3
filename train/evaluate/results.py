"""The rows of an evaluation, as a table in Markdown and CSV, and as JSON with every figure."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.io.files import write_utf8
from train.measures.clip_measures import ClipMeasures
from train.measures.losses import Interval

MEASURES = tuple(ClipMeasures.__dataclass_fields__)
_HEAD = ("row", "length", "frames", "attention GFLOPs", "loss", "tuned minus this", *MEASURES, "text alignment")


@dataclass
class Row:
    """A variant at a length.

    Attributes:
        gflops: of self-attention in one forward; None where nothing ran.
        losses: (clips, noise levels); None where no held-out clips are as long.
        shares: of the noise levels in the mean.
        measures: of each generated clip; of the held-out clips, of each of them.
        alignment: of each generated clip with its prompt.
    """

    name: str
    times: int
    frames: int
    tuned: bool = False
    gflops: float | None = None
    losses: list[list[float]] | None = None
    shares: Sequence[float] = ()
    measures: list[ClipMeasures] = field(default_factory=list)
    alignment: list[float] = field(default_factory=list)

    def clip_losses(self, level: int | None = None) -> list[float]:
        """Each clip's loss: the mean over the noise levels with their shares, or that at one level."""
        assert self.losses is not None
        if level is not None:
            return [one[level] for one in self.losses]
        return [sum(share * loss for share, loss in zip(self.shares, one, strict=True)) for one in self.losses]

    def loss(self, level: int | None = None) -> Interval | None:
        """The mean over the clips with its 95 % interval."""
        return None if self.losses is None else Interval.of(self.clip_losses(level))

    def minus(self, other: Row, level: int | None = None) -> Interval | None:
        """The difference to another row of the same clips, paired over them."""
        if other is self or self.losses is None or other.losses is None or other.times != self.times:
            return None
        pairs = zip(self.clip_losses(level), other.clip_losses(level), strict=True)
        return Interval.of([mine - its for mine, its in pairs])

    def measure(self, name: str) -> Interval | None:
        """A measure's mean over the clips; its interval is infinite for a single clip."""
        return _interval([getattr(one, name) for one in self.measures])

    def text_alignment(self) -> Interval | None:
        """The mean over the clips."""
        return _interval(self.alignment)


def _interval(values: Sequence[float]) -> Interval | None:
    if not values:
        return None
    return Interval.of(values) if len(values) > 1 else Interval(values[0], math.inf)


def tuned_of(rows: Sequence[Row], times: int) -> Row:
    """The tuned model's row of a length."""
    return next(row for row in rows if row.tuned and row.times == times)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table in words, its head first; an empty cell is what was not measured."""
    table = [list(_HEAD)]
    for row in rows:
        gain = tuned_of(rows, row.times).minus(row)
        loss = row.loss()
        measured = [row.measure(name) for name in MEASURES]
        table.append(
            [
                row.name,
                f"{row.times}x",
                str(row.frames),
                "" if row.gflops is None else f"{row.gflops:.1f}",
                "" if loss is None else f"{loss.mean:.4f} ± {loss.half:.4f}",
                "" if gain is None else str(gain),
                *("" if one is None else f"{one.mean:.3f}{_half(one)}" for one in (*measured, row.text_alignment())),
            ]
        )
    return table


def _half(interval: Interval) -> str:
    return f" ± {interval.half:.3f}" if math.isfinite(interval.half) else ""


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table, and what is missing in it."""
    head, *body = cells(rows)
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = "\n".join(f"* {note}" for note in notes)
    return f"{table}\n\n± is half of a 95 % interval over clips.\n{missing}".rstrip() + "\n"


def write_results(
    rows: Sequence[Row], levels: Sequence[float], notes: Sequence[str], about: dict[str, object], out: Path
) -> None:
    """Writes ``results.md``, ``results.csv`` and ``results.json``."""
    write_utf8(out / "results.md", markdown(rows, notes))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(_numbers(rows, levels))
    write_utf8(out / "results.csv", text.getvalue())
    found = {
        "about": about,
        "noise_levels": list(levels),
        "not_measured": list(notes),
        "rows": [_as_json(row, tuned_of(rows, row.times), levels) for row in rows],
    }
    write_utf8(out / "results.json", json.dumps(found, indent=1) + "\n")


def _numbers(rows: Sequence[Row], levels: Sequence[float]) -> list[list[object]]:
    """The table as numbers, with a column for each mean and each half-width."""
    by_level = [f"loss at {level:.4g}" for level in levels]
    names = ["loss", *by_level, *MEASURES, "text alignment"]
    table: list[list[object]] = [
        ["row", "times", "frames", "attention GFLOPs", *(cell for name in names for cell in (name, f"{name} ±"))]
    ]
    for row in rows:
        found = [row.loss(), *(row.loss(i) for i in range(len(levels)))]
        found += [*(row.measure(name) for name in MEASURES), row.text_alignment()]
        values: list[object] = ["" if row.gflops is None else row.gflops]
        for one in found:
            values += ["", ""] if one is None else [one.mean, one.half if math.isfinite(one.half) else ""]
        table.append([row.name, row.times, row.frames, *values])
    return table


def _as_json(row: Row, tuned: Row, levels: Sequence[float]) -> dict[str, object]:
    by_level = {
        f"{level:.4g}": {"loss": _pair(row.loss(i)), "tuned_minus_this": _pair(tuned.minus(row, i))}
        for i, level in enumerate(levels)
        if row.losses is not None
    }
    return {
        "name": row.name,
        "times": row.times,
        "frames": row.frames,
        "tuned": row.tuned,
        "attention_gflops": row.gflops,
        "loss": _pair(row.loss()),
        "tuned_minus_this": _pair(tuned.minus(row)),
        "by_noise_level": by_level,
        "losses": row.losses,
        "measures": {name: _pair(row.measure(name)) for name in MEASURES},
        "measures_of_clips": [{name: _finite(getattr(one, name)) for name in MEASURES} for one in row.measures],
        "text_alignment": _pair(row.text_alignment()),
        "text_alignment_of_clips": row.alignment,
    }


def _pair(interval: Interval | None) -> dict[str, float | None] | None:
    return None if interval is None else {"mean": _finite(interval.mean), "half_width_95": _finite(interval.half)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
