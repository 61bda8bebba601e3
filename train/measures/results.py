"""The table of a run's held-out clips, and what it shows in words. The last row is what the run has trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.io.files import write_utf8
from train.measures.losses import Interval

TABLE, TEXT = "report.json", "report.txt"


@dataclass(frozen=True)
class Row:
    """One variant of the table.

    Attributes:
        frames: of its clips, in latents.
        losses: the flow loss of each clip, in the same order in every row of these frames.
        attention_gflops: of self-attention in one forward of one clip, 1e9 operations.
    """

    name: str
    frames: int
    losses: list[float]
    attention_gflops: float

    @property
    def loss(self) -> float:
        """The mean over the clips."""
        return sum(self.losses) / len(self.losses)

    def minus(self, other: Row) -> Interval | None:
        """The difference to another row, paired over the clips; None for the row itself and for other clips."""
        if other is self or other.frames != self.frames:
            return None
        return Interval.of([mine - its for mine, its in zip(self.losses, other.losses, strict=True)])


def write_results(rows: Sequence[Row], folder: Path) -> None:
    """Prints the table with its findings; writes both to ``report.txt``, and the table to ``report.json``."""
    lines = [
        f"{'held-out clips: ' + str(len(rows[-1].losses)):<28} {'frames':>6} {'flow loss':>10} "
        f"{'attention GFLOPs':>17}   tuned minus this (95 %)"
    ]
    table = []
    for row in rows:
        gain = rows[-1].minus(row)
        figures = f"{row.frames:>6} {row.loss:>10.4f} {row.attention_gflops:>17.1f}"
        lines.append(f"{row.name:<28} {figures}   {gain or ''}")
        table.append(
            {
                "name": row.name,
                "frames": row.frames,
                "flow_loss": row.loss,
                "attention_gflops": row.attention_gflops,
                "tuned_minus_this": gain and {"mean": gain.mean, "half_width_95": gain.half},
                "losses": row.losses,
            }
        )
    lines += ["", *findings(rows)]
    print("\n" + "\n".join(lines))
    write_utf8(folder / TABLE, json.dumps(table, indent=1))
    write_utf8(folder / TEXT, "\n".join(lines) + "\n")


def read_results(folder: Path) -> list[Row]:
    """The rows that `write_results` wrote into a run's folder; none before that."""
    file = folder / TABLE
    if not file.exists():
        return []
    table = json.loads(file.read_text(encoding="utf-8"))
    return [Row(row["name"], row["frames"], row["losses"], row["attention_gflops"]) for row in table]


def findings(rows: Sequence[Row]) -> list[str]:
    """What the rows of the trained model's length show, a sentence for each comparison."""
    *untuned, tuned = (row for row in rows if row.frames == rows[-1].frames)
    if not untuned:
        return []
    dense = untuned[0]
    masks = [(row, dense) for row in untuned[1:]]
    return [f"The loss of {row.name} is {_beside(row, other)} that of {other.name}." for row, other in masks] + [
        f"Tuned, the loss of {tuned.name} is {_beside(tuned, other)} that of {other.name}." for other in untuned
    ]


def _beside(row: Row, other: Row) -> str:
    difference = row.minus(other)
    if difference is not None and not math.isfinite(difference.half):
        return "not comparable (a value is not finite) with"
    if difference is None or abs(difference.mean) <= difference.half:
        return f"not distinguishable ({difference}) from"
    return f"{abs(difference.mean):.4f} ± {difference.half:.4f} {'above' if difference.mean > 0 else 'below'}"
