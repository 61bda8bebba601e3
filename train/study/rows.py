"""The rows of the study: what is compared, and with which settings of a run.

All tuned rows have equal steps, clips, noise and learning rate, and interpolated positions, but for the one that is
there to show what positions do. Masks are compared at equal shares of the blocks, those of the released mask. Masks
fitted to the base's own attention are rows (`train.study.fits`), or else every file of masks in the folder ``masks=``,
whose name is that of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from radial import HeadMasks
from train.errors import UserError
from train.study.fits import Fit
from train.study.masks import masks_file, released_share
from train.study.settings import Job

RIVALS = ("local", "spatial", "temporal", "sliding_tile", "power", "shifted")
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
        fit: how its masks are fitted; None where it has none, or they are a file of the user's.
    """

    name: str
    words: str
    tuned: bool
    settings: dict[str, str] = field(default_factory=dict)
    fit: Fit | None = None


BASE = Row("base", "base", False, {"attention": "dense", "rope": "default"})
"""The base as it is: measured at its own length, and the eyes of the Fréchet distance."""
TRUTH = Row("truth", "the true clips", False)
"""What the generated clips are compared with."""


def rows_of(job: Job) -> list[Row]:
    """The rows in the order in which they are measured, that of ``rows=`` where it names some.

    Raises:
        UserError: ``rows=`` names one that there is not, or a file of masks that is none.
    """
    every = [*_untuned(job), *_tuned(job, released_share(job))]
    if job.given.rows == "all":
        return every
    by_name = {row.name: row for row in every}
    names = job.given.rows.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UserError(
            f"rows has {unknown[0]!r}, expected all, or some of {', '.join(by_name)}; fitted rows are those of "
            f"{f'the files in masks={job.given.masks}' if job.given.masks else f'fitted={job.given.fitted}'}"
        )
    return [by_name[name] for name in dict.fromkeys(names)]


def _untuned(job: Job) -> list[Row]:
    dense = {"attention": "dense"}
    return [
        Row("untuned_dense", "untuned, dense, default positions", False, {**dense, "rope": "default"}),
        Row("untuned_riflex", "untuned, dense, RIFLEx", False, {**dense, "rope": "riflex"}),
        Row("untuned_interpolate", "untuned, dense, interpolated positions", False, dense),
        Row("untuned_released", "untuned, released", False, {"attention": "radial"}),
        Row("untuned_random", "untuned, random blocks", False, {"attention": "random"}),
        Row("untuned_paper", "untuned, the paper's Eq. 4", False, {"attention": "paper"}),
        *(_untuned_fitted(row) for row in _fitted_rows(job)),
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
        *_fitted_rows(job),
        Row("released_default", "released, default positions", True, {"attention": "radial", "rope": "default"}),
        Row(
            "full", "released, all weights trained", True,
            {"attention": "radial", "lora": "null", "optim.lr": "1e-4"},
        ),
    ]  # fmt: skip


def _fitted_rows(job: Job) -> list[Row]:
    """Tuned rows of the masks that are fitted to the base, or of the user's files."""
    files = _files(job)
    share = released_share(job)
    return [*(_fitted(job, fit) for fit in job.masks), *(_from_file(file, share) for file in files)]


def _untuned_fitted(row: Row) -> Row:
    """The base under a tuned row's masks."""
    return Row(f"untuned_{row.name}", f"untuned, {row.words}", False, row.settings, row.fit)


def _files(job: Job) -> list[Path]:
    """The files of masks, those with the most blocks first."""
    folder = job.given.masks
    if folder is None:
        return []
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"masks {folder} has no *.safetensors, expected files of python -m radial fit")
    return sorted(files, key=lambda file: -HeadMasks.read(file).about.share)


def _fitted(job: Job, fit: Fit) -> Row:
    words = f"fitted, {fit.share:g} of released's blocks, {fit.coverage:.0%} drawn"
    settings = {"attention": "fitted", "attention.masks": str(masks_file(job, fit))}
    return Row(f"fitted_{fit.name}", words, True, settings, fit)


def _from_file(file: Path, share: float) -> Row:
    about = HeadMasks.read(file).about
    words = f"fitted, {about.share / share:.2g} of released's blocks, {about.coverage:.0%} drawn, {about.order}"
    words += ", separable" if about.separable else ""
    return Row(f"fitted_{file.stem}", words, True, {"attention": "fitted", "attention.masks": str(file)})
