"""Which of the listed videos are candidates, the best first; no video is opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data.prepare.conditions import Condition, parse_conditions, split_conditions
from data.prepare.sources import Columns, Video, name_of, ranked, read_source


@dataclass(frozen=True)
class Candidates:
    """The listed videos that meet the conditions on the list's columns, the best first.

    Attributes:
        about: the list and the conditions, as they are named in errors.
        root: the folder that the listed paths are relative to.
        listed: how many videos the list has.
        matching: those that are left, each path once.
        probed: conditions on what the videos' headers say.
        told: what is to be said of the list.
    """

    about: str
    root: str
    listed: int
    matching: list[Video]
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
        sort: as `ranked` takes it; None keeps the order of the list.

    Raises:
        DataError: as `read_source`, `parse_conditions` and `ranked`.
    """
    found = read_source(source, columns)
    own, probed = split_conditions(parse_conditions(where) if where else [], found.columns)
    matching = [video for video in found.videos if all(condition.holds(video.columns) for condition in own)]
    if sort is not None:
        matching = ranked(matching, sort, found.columns)
    matching, told = _once(matching, source)
    root = (videos or (source if source.is_dir() else source.parent)).absolute()
    about = f"{source} with where={where}" if where else str(source)
    # The columns have done their work, and of a million rows they are most of the memory.
    matching = [replace(video, columns={}) for video in matching]
    return Candidates(about, str(root), len(found.videos), matching, probed, [*found.told, *told])


def _once(videos: list[Video], source: Path) -> tuple[list[Video], list[str]]:
    """Each path once, as it comes first, and what to say of the others."""
    first: dict[str, Video] = {}
    again = [video for video in videos if video.path and first.setdefault(name_of(video), video) is not video]
    if not again:
        return videos, []
    repeated = {id(video) for video in again}
    other = [video for video in again if video.caption != first[name_of(video)].caption]
    captions = f" ({len(other)} with another caption, such as {name_of(other[0])})" if other else ""
    rows = f"rows whose video an earlier row names: {len(again)}, such as {name_of(again[0])}{captions}"
    told = f"{source}: {rows}; the first of each counts"
    return [video for video in videos if id(video) not in repeated], [told]
