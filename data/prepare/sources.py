"""Lists of videos: a folder with captions beside the videos, or a table; pieces of long videos; ranking."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import read_utf8
from data.prepare import layouts
from data.prepare.conditions import no_column, number
from data.prepare.folder import SUFFIXES, search
from data.prepare.spans import Span, spans_of, texts_of, usual
from data.prepare.tables import Row, read_table


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
        span: the piece of it that is meant; None is all of it.
        uncaptioned: all that it lacks is a caption.
    """

    path: str
    caption: str | None
    columns: Mapping[str, Any]
    problem: str | None = None
    span: Span | None = None
    uncaptioned: bool = False


def name_of(video: Video) -> str:
    """What a listed video is called: its path, and which piece of it is meant."""
    if video.span is None:
        return video.path
    end = "" if video.span.end is None else f"{video.span.end:g}"
    return f"{video.path}[{video.span.start:g}-{end}{' frames' if video.span.frames else ''}]"


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


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns that are asked for; None is the usual one.

    Attributes:
        path, caption: of paths and captions.
        start, end: of when a piece of the video begins and ends, as in `data.prepare.spans`.
        otherwise: what a video without a caption gets: `require` none, so that it is bad, `empty` an empty one, any
            other word that of the column of this name.
    """

    path: str | None = None
    caption: str | None = None
    start: str | None = None
    end: str | None = None
    otherwise: str = "require"


def read_source(source: Path, asked: Columns = Columns()) -> Listed:
    """The list of videos.

    Args:
        source: a .csv, .tsv, .json, .jsonl or .parquet table; or a folder: one with a metadata.csv, .jsonl or .parquet,
            one with videos.txt and prompts.txt, or one that is searched, with all folders in it and those linked there,
            for videos with a .txt or .json file of the same name beside them, but for hidden ones.
        asked: the columns of a table.

    Raises:
        DataError: no such source, not a table, a line that is none of the table, a column that is not there, or nothing
            in it.
    """
    table = layouts.table_in(source) if source.is_dir() else source
    if table is not None:
        return _read_table(table, read_table(table), asked)
    rows = layouts.lists_in(source)
    return _read_folder(source, asked) if rows is None else _read_table(source / layouts.VIDEOS, rows, asked)


def _read_folder(source: Path, asked: Columns) -> Listed:
    found = search(source)
    if not found.videos:
        told = "".join(f"; {line}" for line in found.told(source))
        ends = ", ".join(SUFFIXES)
        raise NoVideosError(f"{source}: no videos in this folder, expected files that end in {ends}{told}")
    videos = [_captioned(path, source) for path in found.videos]
    columns = list(dict.fromkeys(name for video in videos for name in video.columns))
    return Listed(_captions(videos, asked, columns), columns, told=found.told(source))


def _read_table(source: Path, rows: list[Row], asked: Columns) -> Listed:
    if not rows:
        raise NoVideosError(f"{source}: the table is empty, expected a line for each video")
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    if layouts.web_vid(columns) and asked.path is None:
        rows = [(place, layouts.web_vid_row(row)) for place, row in rows]
        columns = [*columns, "path", "caption"]
    path = _column(source, "path_column", asked.path, layouts.PATHS, columns)
    caption = _column(source, "caption_column", asked.caption, layouts.CAPTIONS, columns)
    start, end = _span_columns(asked, columns, rows)
    names = _Names(path, caption, start, end)
    videos = [video for place, row in rows for video in _pieces(place, row, names)]
    return Listed(_captions(videos, asked, columns), columns)


def _captions(videos: list[Video], asked: Columns, columns: Sequence[str]) -> list[Video]:
    """The videos, those without a caption with what they get instead."""
    if asked.otherwise == "require":
        return videos
    if asked.otherwise != "empty" and asked.otherwise not in columns:
        raise DataError(f"captions: {no_column(asked.otherwise, columns)}; or give require or empty")

    def captioned(video: Video) -> Video:
        if not video.uncaptioned:
            return video
        if asked.otherwise == "empty":
            return replace(video, caption="", problem=None)
        again = _video(video.path, video.columns.get(asked.otherwise), video.columns, video.problem or "")
        return replace(again, span=video.span)

    return [captioned(video) for video in videos]


@dataclass(frozen=True)
class _Names:
    path: str
    caption: str
    start: str | None
    end: str | None


def _span_columns(asked: Columns, columns: Sequence[str], rows: Sequence[Row]) -> tuple[str | None, str | None]:
    """The columns of starts and ends; one that usually holds both only where it does."""
    for key, name in (("start_column", asked.start), ("end_column", asked.end)):
        if name is not None and name not in columns:
            raise DataError(f"{key}: {no_column(name, columns)}")
    if asked.start or asked.end:
        return asked.start, asked.end
    start, end = usual(columns)
    if start is None or start != end:
        return start, end
    first = next((row for _, row in rows if row.get(start)), {})
    try:
        return (start, end) if spans_of(first, start, end) else (None, None)
    except DataError:
        return None, None  # a date, for one


def _pieces(place: str, row: Mapping[str, Any], names: _Names) -> list[Video]:
    """A row of a table as videos: one for each piece that it names."""
    try:
        spans = spans_of(row, names.start, names.end) if names.start or names.end else []
        if not spans:
            return [_row(place, row, row.get(names.caption), names)]
        texts = texts_of(row.get(names.caption), len(spans))
    except DataError as error:
        path = row.get(names.path)
        return [Video(path if isinstance(path, str) else "", None, row, f"{place}: {error}")]
    videos = [_row(place, row, text, names) for text in texts]
    return [replace(video, span=span) for video, span in zip(videos, spans, strict=True)]


def _row(place: str, row: Mapping[str, Any], caption: Any, names: _Names) -> Video:
    """A row of a table as a video with this caption."""
    path = row.get(names.path)
    if path is None or path != path or not str(path).strip():
        return Video("", None, row, f"{place} has no path in the column {names.path}")
    if not isinstance(path, str):
        return Video("", None, row, f"{place} has a path of type {type(path).__name__}, expected text")
    missing = f"no caption in the column {names.caption}, {place}"
    return _video(path, caption, row, missing)


def _video(path: str, caption: Any, columns: Mapping[str, Any], missing: str) -> Video:
    """A line of the list; a caption that cannot be stored as text is none."""
    if caption is None or caption != caption:  # NaN is how some tables write that nothing is there
        return Video(path, None, columns, missing, uncaptioned=True)
    if not isinstance(caption, str):
        return Video(path, None, columns, f"caption is of type {type(caption).__name__}, expected text")
    if "\0" in caption:
        return Video(path, None, columns, "caption holds a zero byte, as UTF-16 does; save it as UTF-8")
    try:
        caption.encode()
    except UnicodeEncodeError:
        return Video(path, None, columns, "caption has half a character (a lone surrogate)")
    caption = caption.strip()
    return Video(path, caption, columns) if caption else Video(path, None, columns, missing, uncaptioned=True)


def _captioned(path: Path, root: Path) -> Video:
    """A video of a folder, with the caption of its .txt, or of its .json, whose fields are its columns."""
    listed, text = str(path.relative_to(root)), path.with_suffix(".txt")
    try:
        columns = layouts.beside(path)
    except (DataError, OSError) as error:
        return Video(listed, None, {}, f"{path.with_suffix('.json').name} cannot be used: {error}")
    try:
        return _video(listed, read_utf8(text), columns, f"no caption, {text.name} is empty")
    except FileNotFoundError:
        named = next((name for name in layouts.CAPTIONS if name in columns), None)
        missing = f"no caption, expected {text.name} beside it"
        return _video(listed, columns[named] if named else None, columns, missing)
    except DataError as error:
        return Video(listed, None, columns, f"caption cannot be used: {str(error).removeprefix(f'{text}: ')}")
    except OSError as error:
        return Video(listed, None, columns, f"caption cannot be read ({error.strerror})")


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
