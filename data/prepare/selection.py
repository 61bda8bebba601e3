"""Which of the listed videos are candidates, the best first; no video is opened."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.prepare.conditions import Condition, no_column, number, parse_conditions, split_conditions
from data.prepare.listed import Candidate, CandidateList, Listed, name_of
from data.prepare.sources import Columns, read_source


@dataclass(frozen=True)
class Candidates:
    """The listed videos that meet the conditions on the list's columns, the best first.

    Attributes:
        found: the list.
        about: the list and the conditions, as they are named in errors.
        root: the folder that the listed paths are relative to.
        listed: how many videos the list has.
        matching: those that are left, each path once.
        probed: conditions on what the videos' headers say.
        told: what is to be said of the list.
    """

    found: Listed
    about: str
    root: str
    listed: int
    matching: CandidateList
    probed: list[Condition]
    told: list[str]


def select(
    *,
    source: Path,
    videos: Path | None,
    columns: Columns,
    where: str | None,
    sort: str | None,
) -> Candidates:
    """Read the list and choose by its columns.

    Args:
        source, columns: as in `read_source`.
        videos: the folder that the paths are relative to; None is the source's own.
        where: conditions, as `parse_conditions` takes them.
        sort: as `Ranking` takes it; None keeps the order of the list.

    Raises:
        DataError: as `read_source`, `parse_conditions` and `Ranking`.
    """
    found = read_source(source, columns)
    own, probed = split_conditions(parse_conditions(where) if where else [], found.columns)
    ranking = Ranking(sort, found.columns) if sort is not None else None
    asked = [condition.column for condition in own] + (ranking.names if ranking else [])
    matching = CandidateList()
    names, captions, scores = array("q"), array("q"), array("d")  # a million of them take 8 MB
    listed = 0
    for video in found.videos(asked):
        listed += 1
        if all(condition.holds(video.columns) for condition in own):
            matching.append(Candidate(video.path, video.problem, video.span, video.place))
            names.append(hash(name_of(video)))
            captions.append(hash(video.caption))
            if ranking is not None:
                scores.append(ranking.score(video.columns))
    order = np.arange(len(matching)) if ranking is None else np.argsort(-np.asarray(scores), kind="stable")
    kept, told = _once(matching, order, np.asarray(names), captions, source)
    root = (videos or (source if source.is_dir() else source.parent)).absolute()
    about = f"{source} with where={where}" if where else str(source)
    return Candidates(found, about, str(root), listed, kept, probed, [*found.told, *told])


class Ranking:
    """Scores by a column, or by the sum of several joined by `+`.

    Attributes:
        names: the columns.

    Args:
        sort: what is asked for.
        columns: the table's.

    Raises:
        DataError: an unknown column.
    """

    def __init__(self, sort: str, columns: Collection[str]) -> None:
        # A column's own name may hold a plus.
        self.names = [sort] if sort in columns else [name.strip() for name in sort.split("+")]
        for name in self.names:
            if name not in columns:
                raise DataError(f"sort: {no_column(name, columns)}")

    def score(self, cells: Mapping[str, Any]) -> float:
        """A row's score: the higher the better, and the least where it lacks one of the numbers."""
        total = 0.0
        for name in self.names:
            value = number(cells.get(name))
            if value is None:
                return -math.inf
            total += value
        return total


def _once(
    videos: CandidateList, order: np.ndarray, names: np.ndarray, captions: array[int], source: Path
) -> tuple[CandidateList, list[str]]:
    """The videos in this order, each path once, as it comes first, and what to say of the others.

    Args:
        names, captions: a hash of each video's name and of its caption: a dict of a million names takes 200 MB.
    """
    _, first, group = np.unique(names[order], return_index=True, return_inverse=True)
    before = first[group]  # for each place of the order the first one of the same hash
    left_out: list[int] = []
    again: list[str] = []
    other: list[str] = []
    for late in np.flatnonzero(before != np.arange(len(order))).tolist():
        number, earlier = int(order[late]), int(order[before[late]])
        video = videos[number]
        name = name_of(video)
        if not video.path or name != name_of(videos[earlier]):  # different names may have one hash
            continue
        left_out.append(late)
        again.append(name)
        if captions[earlier] != captions[number]:
            other.append(name)
    kept = videos.picked(np.delete(order, left_out))
    if not again:
        return kept, []
    another = f" ({len(other)} with another caption, such as {other[0]})" if other else ""
    rows = f"rows whose video an earlier row names: {len(again)}, such as {again[0]}{another}"
    return kept, [f"{source}: {rows}; the first of each counts"]
