"""The rows of the study: what is compared, and with which settings of a run.

All tuned rows have equal steps, clips, noise and learning rate, and interpolated positions, but for the one that is
there to show what positions do. Masks are compared at equal shares of the blocks, those of the released mask; its
blocks are 1.0 in the names of the fitted rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from radial import Released, build_layout
from train.config.compose import group_options
from train.errors import UserError
from train.study.settings import Job

RIVALS = ("local", "spatial", "temporal", "sliding_tile", "power", "shifted")
FITTED = (1.0, 0.8, 0.6, 0.4)
REFERENCE, FLOOR, CEILING = "released", "random", "dense"
"""What each mask is held against, what it has to beat, and what it can reach."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: on the command line, in folders and files.
        words: in tables.
        tuned: whether a run trains it; otherwise the base is measured as it is.
        settings: of its run, beside those that all rows share.
        left_out: why it cannot be measured; "" where it can.
    """

    name: str
    words: str
    tuned: bool
    settings: dict[str, str] = field(default_factory=dict)
    left_out: str = ""


def released_share(job: Job) -> float:
    """The share of all blocks that the released mask keeps at the study's length."""
    attention = job.config.attention
    pattern = Released(decay=attention.decay, rule=job.config.rule())
    return 1 - build_layout(pattern, job.config.grid(), attention.block).sparsity


def rows_of(job: Job) -> list[Row]:
    """The rows in the order in which they are measured.

    Raises:
        UserError: ``rows=`` names one that there is not.
    """
    every = [*_untuned(), *_tuned(job, released_share(job))]
    if job.given.rows == "all":
        return every
    names = job.given.rows.split(",")
    unknown = [name for name in names if name not in {row.name for row in every}]
    if unknown:
        raise UserError(f"rows has {unknown[0]!r}, expected all, or some of {', '.join(row.name for row in every)}")
    return [row for row in every if row.name in names]


def _untuned() -> list[Row]:
    dense = {"attention": "dense"}
    return [
        Row("untuned_dense", "untuned, dense, default positions", False, {**dense, "rope": "default"}),
        Row("untuned_riflex", "untuned, dense, RIFLEx", False, {**dense, "rope": "riflex"}),
        Row("untuned_interpolate", "untuned, dense, interpolated positions", False, dense),
        Row("untuned_released", "untuned, released", False, {"attention": "radial"}),
        Row("untuned_random", "untuned, random blocks", False, {"attention": "random"}),
    ]


def _tuned(job: Job, share: float) -> list[Row]:
    equal = {"attention.share": f"{share:.6f}"}
    return [
        Row("released", "released", True, {"attention": "radial"}),
        Row("dense", "dense", True, {"attention": "dense"}),
        Row("random", "random blocks, one draw", True, {"attention": "random"}),
        Row(
            "random_per_head", "random blocks, a draw a head", True,
            {"attention": "random", "attention.per_head": "true"},
        ),
        Row("paper", "the paper's Eq. 4", True, {"attention": "paper"}),
        *(Row(name, f"{name.replace('_', ' ')}, equal share", True, {"attention": name, **equal}) for name in RIVALS),
        *(_fitted(job, part, share) for part in FITTED),
        Row("released_default", "released, default positions", True, {"attention": "radial", "rope": "default"}),
        Row(
            "full", "released, all weights trained", True,
            {"attention": "radial", "lora": "null", "optim.lr": "1e-4"},
        ),
    ]  # fmt: skip


def _fitted(job: Job, part: float, share: float) -> Row:
    name, words = f"fitted_{part}", f"fitted masks, {part:g} of released's blocks"
    if "fitted" not in group_options()["attention"]:
        return Row(name, words, True, left_out="this version has no attention=fitted")
    if job.given.masks is None:
        return Row(name, words, True, left_out="masks= is not set")
    file = job.given.masks / f"{part}.safetensors"
    if not Path(file).is_file():
        return Row(name, words, True, left_out=f"{file} is not there, expected masks of share={part * share:.4f}")
    return Row(name, words, True, {"attention": "fitted", "attention.masks": str(file)})
