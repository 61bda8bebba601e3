"""Lists of videos: a folder with captions in .txt files, or a CSV, TSV, JSONL or Parquet table; ranking."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import read_utf8
from data.prepare.conditions import no_column, number
from data.prepare.folder import SUFFIXES, search
from data.prepare.tables import read_table

PATH_COLUMNS = ("path", "video", "video_path", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "prompt")


class NoVideosError(DataError):
    """A list that can be read, and has no video in it that is asked for."""


@dataclass(frozen=True)
class Video:
    """A line of the list.

    Attributes:
        path: as listed; empty where there is none.
        caption: None where there is no text.
        columns: all cells of its row, by column.
        problem: why it cannot be used, where it cannot.
    """

    path: str
    caption: str | None
    columns: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True)
class Listed:
    """A list of videos: the videos, the names of the table's columns, and what is to be said of the rest."""

    videos: list[Video]
    columns: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def ranked(videos: Sequence[Video], sort: str, columns: Collection[str]) -> list[Video]:
    """Highest first by a column, or by the sum of several joined by `+`; lines without the numbers come last.

    Raises:
        DataError: an unknown column.
    """
    # A column's own name may hold a plus.
    names = [sort] if sort in columns else [name.strip() for name in sort.split("+")]
    for name in names:
        if name not in columns:
            raise DataError(f"sort: {no_column(name, columns)}")

    def score(video: Video) -> float:
        values = [number(video.columns.get(name)) for name in names]
        return -math.inf if None in values else sum(value for value in values if value is not None)

    return sorted(videos, key=score, reverse=True)


def read_source(source: Path, path_column: str | None = None, caption_column: str | None = None) -> Listed:
    """The list of videos.

    Args:
        source: a folder, searched with all folders in it and those linked there for videos with a .txt file of the same
            name beside them, but for hidden ones; or a .csv, .tsv, .jsonl or .parquet table.
        path_column, caption_column: of a table; None takes the first of `PATH_COLUMNS` and `CAPTION_COLUMNS` there.

    Raises:
        DataError: no such source, not a table, a line that is none of the table, a column that is not there, or nothing
            in it.
    """
    if source.is_dir():
        found = search(source)
        if not found.videos:
            told = "".join(f"; {line}" for line in found.told(source))
            ends = ", ".join(SUFFIXES)
            raise NoVideosError(f"{source}: no videos in this folder, expected files that end in {ends}{told}")
        return Listed([_captioned(path, source) for path in found.videos], told=found.told(source))
    rows = read_table(source)
    if not rows:
        raise NoVideosError(f"{source}: the table is empty, expected a line for each video")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    path_name = _column(source, "path_column", path_column, PATH_COLUMNS, columns)
    caption_name = _column(source, "caption_column", caption_column, CAPTION_COLUMNS, columns)
    return Listed([_row(place, row, path_name, caption_name) for place, row in rows], columns)


def _row(place: str, row: Mapping[str, Any], path_name: str, caption_name: str) -> Video:
    """A row of a table as a video."""
    path = row.get(path_name)
    if path is None or path != path or not str(path).strip():
        return Video("", None, row, f"{place} has no path in the column {path_name}")
    if not isinstance(path, str):
        return Video("", None, row, f"{place} has a path of type {type(path).__name__}, expected text")
    missing = f"no caption in the column {caption_name}, {place}"
    return _video(path, row.get(caption_name), row, missing)


def _video(path: str, caption: Any, columns: Mapping[str, Any], missing: str) -> Video:
    """A line of the list; a caption that cannot be stored as text is none."""
    if caption is None or caption != caption:  # NaN is how some tables write that nothing is there
        return Video(path, None, columns, missing)
    if not isinstance(caption, str):
        return Video(path, None, columns, f"caption is of type {type(caption).__name__}, expected text")
    if "\0" in caption:
        return Video(path, None, columns, "caption holds a zero byte, as UTF-16 does; save it as UTF-8")
    try:
        caption.encode()
    except UnicodeEncodeError:
        return Video(path, None, columns, "caption has half a character (a lone surrogate)")
    caption = caption.strip()
    return Video(path, caption, columns) if caption else Video(path, None, columns, missing)


def _captioned(path: Path, root: Path) -> Video:
    listed, beside = str(path.relative_to(root)), path.with_suffix(".txt")
    try:
        return _video(listed, read_utf8(beside), {}, f"no caption, {beside.name} is empty")
    except FileNotFoundError:
        return Video(listed, None, {}, f"no caption, expected {beside.name} beside it")
    except DataError as error:
        return Video(listed, None, {}, f"caption cannot be used: {str(error).removeprefix(f'{beside}: ')}")
    except OSError as error:
        return Video(listed, None, {}, f"caption cannot be read ({error.strerror})")


def _column(source: Path, key: str, asked: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{key}: {no_column(asked, columns)}")
        return asked
    for name in usual:
        if name in columns:
            return name
    found = ", ".join(columns)
    raise DataError(f"{source}: no column named {' or '.join(usual)}, found {found}; give {key}=NAME")
