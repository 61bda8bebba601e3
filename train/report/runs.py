"""Finished and unfinished runs as they lie on disk, and which of them differ by their seed alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from train.config.compose import read_config
from train.config.schema import RunConfig
from train.errors import UserError
from train.loggers.csv_file import METRICS, read_metrics
from train.measures.losses import Interval
from train.measures.results import read_results
from train.storage.run_folder import CONFIG, get_state
from train.storage.sweep_folder import SweepFolder, is_sweep

Points = Sequence[tuple[float, float]]
Rows = list[dict[str, str]]

LOSSES = ("held-out loss", "validation loss", "training loss")
"""What shows how good a run is, best evidence first."""
FIGURES = (*LOSSES, "attention GFLOPs", "seconds a step", "peak GiB")
"""What is compared of runs."""


def series(rows: Rows, key: str) -> list[tuple[float, float]]:
    """(optimizer step from 1, figure) of a column of metrics.csv, where it has one."""
    return [(int(row["step"]) + 1, float(row[key])) for row in rows if row.get(key)]


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


@dataclass(frozen=True)
class Run:
    """A run's folder, read once.

    Attributes:
        name: how it is called among others: its number in a sweep, else the folder's last two names.
        changes: its settings that other runs of its sweep do not have, as typed; None outside of a sweep.
        state: word and reason, as `train.storage.run_folder.get_state`.
    """

    folder: Path
    name: str
    config: RunConfig
    changes: dict[str, str] | None
    state: tuple[str, str]

    @classmethod
    def read(cls, folder: Path, sweep: SweepFolder | None = None) -> Run:
        """The run in a folder.

        Raises:
            UserError: there is none.
        """
        # a copy in the sweep's folder is no run of it
        inside = sweep is not None and folder in map(sweep.run, range(len(sweep.settings)))
        changes = sweep.changes(int(folder.name)) if sweep is not None and inside else None
        name = folder.name if inside else "/".join(folder.resolve().parts[-2:])
        return cls(folder, name, read_config(folder), changes, get_state(folder))

    @cached_property
    def rows(self) -> Rows:
        """The rows of the run's metrics.csv."""
        return read_metrics(self.folder / METRICS)

    @cached_property
    def figures(self) -> dict[str, float]:
        """The `FIGURES` that it has: the last losses, finite or not, a step's median seconds, the peak of memory."""
        found: dict[str, float] = {}
        trained = next(reversed(read_results(self.folder)), None)
        if trained is not None:
            found |= {"held-out loss": trained.loss, "attention GFLOPs": trained.attention_gflops}
        columns: tuple[tuple[str, str, Callable[[Points], float]], ...] = (
            ("validation loss", "validation/loss", lambda points: points[-1][1]),
            ("training loss", "loss", lambda points: next(reversed(smoothed(points)), (0, math.nan))[1]),
            ("seconds a step", "step_seconds", lambda points: median(value for _, value in points)),
            ("peak GiB", "memory_gib", lambda points: max(value for _, value in points)),
        )
        return found | {name: figure(points) for name, key, figure in columns if (points := series(self.rows, key))}

    @property
    def result(self) -> str:
        """The best evidence that it has, in words."""
        name = next((name for name in LOSSES if name in self.figures), None)
        return "no step yet" if name is None else f"{name} {self.figures[name]:.4f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        changes: the settings in which they differ from other groups.
    """

    changes: dict[str, str]
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The settings as words of a command line."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or self.runs[0].config.conf

    def figure(self, name: str) -> Interval | float | None:
        """The mean of a figure over the seeds that have it, with its 95 % interval where they are several."""
        values = list(self.by_seed(name).values())
        if not values:
            return None
        return values[0] if len(values) == 1 else Interval.of(values)

    def minus(self, other: Group, name: str) -> Interval | None:
        """The difference of a figure to another group's, paired over seeds; None with fewer than two pairs."""
        mine, its = self.by_seed(name), other.by_seed(name)
        pairs = [mine[seed] - its[seed] for seed in mine if seed in its]
        return Interval.of(pairs) if len(pairs) > 1 and other is not self else None

    def by_seed(self, name: str) -> dict[int, float]:
        """A figure of each seed that has it, the mean where a seed was run more than once."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            if name in run.figures:
                found.setdefault(run.config.seed, []).append(run.figures[name])
        return {seed: fmean(values) for seed, values in found.items()}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in folders, each of which is a run's, a sweep's, or holds the folders of runs; each run once.

    Raises:
        UserError: one is none of these.
    """
    found: list[Run] = []
    for folder in folders:
        if (folder / CONFIG).is_file():
            sweep = SweepFolder.read(folder.parent) if is_sweep(folder.parent) else None
            found.append(Run.read(folder, sweep))
        elif is_sweep(folder):
            sweep = SweepFolder.read(folder)
            found += [Run.read(sweep.run(number), sweep) for number in range(len(sweep.settings))]
        else:
            inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
            if not inside:
                raise UserError(f"runs: {folder} has no run, expected a sweep's folder or run folders, by commas")
            found += [Run.read(each) for each in inside]
    return list({run.folder.resolve(): run for run in found}.values())


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by the settings in which they differ, in the order of their first runs."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run, changes in zip(runs, differing(runs), strict=True):
        key = tuple((name, value) for name, value in changes.items() if name != "seed")
        groups.setdefault(key, []).append(run)
    return [Group(dict(key), tuple(inside)) for key, inside in groups.items()]


def differing(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of each run, the settings that are not the same in all: as typed where all are of one sweep, else by key."""
    if len({run.folder.parent for run in runs}) == 1 and all(run.changes is not None for run in runs):
        return [run.changes or {} for run in runs]
    flat = [dict(_leaves(asdict(run.config))) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key != "runs"]
    apart = [key for key in keys if len({repr(each.get(key)) for each in flat}) > 1]
    return [{key: _as_text(each.get(key)) for key in apart} for each in flat]


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _as_text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
