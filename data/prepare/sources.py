"""Reading a list of videos: a folder with captions beside the videos, or a table; pieces of long videos."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import read_utf8
from data.prepare import layouts
from data.prepare.conditions import no_column
from data.prepare.folder import SUFFIXES, search
from data.prepare.listed import Listed, NoVideosError, Video
from data.prepare.parquet_table import ParquetTable
from data.prepare.spans import Span, spans_of, texts_of, usual
from data.prepare.table import Table
from data.prepare.tables import HeldTable, open_table


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
            for videos with a .txt or .json file of the same name beside them, but for hidden ones; where it has none,
            one with .parquet files, which are read as one table.
        asked: the columns of a table.

    Raises:
        DataError: no such source, not a table, a line that is none of the table, a column that is not there, or nothing
            in it.
    """
    table = layouts.table_in(source) if source.is_dir() else source
    if table is not None:
        return _read_table(table, open_table(table), asked)
    rows = layouts.lists_in(source)
    if rows is None:
        return _read_folder(source, asked)
    return _read_table(source / layouts.VIDEOS, HeldTable("line", rows), asked)


def _read_folder(source: Path, asked: Columns) -> Listed:
    found = search(source)
    parquets = layouts.parquets_in(source)
    if not found.videos and parquets:
        return _read_table(source, ParquetTable(parquets, source), asked)
    if not found.videos:
        told = "".join(f"; {line}" for line in found.told(source))
        ends = ", ".join(SUFFIXES)
        raise NoVideosError(f"{source}: no videos in this folder, expected files that end in {ends}{told}")
    videos = [_captioned(path, source)._replace(place=place) for place, path in enumerate(found.videos)]
    columns = list(dict.fromkeys(name for video in videos for name in video.columns))
    _check_otherwise(asked, columns)

    def read(places: Container[int] | None, _: Collection[str] | None) -> Iterator[Video]:
        return (_captions(video, asked) for video in videos if places is None or video.place in places)

    return Listed(source, columns, found.told(source), read)


def _read_table(source: Path, table: Table, asked: Columns) -> Listed:
    if next(table.rows(), None) is None:
        raise NoVideosError(f"{source}: the table is empty, expected a line for each video")
    columns = list(table.columns)
    # a table with a path of its own says itself where its videos are
    known = layouts.collection_of(columns) if asked.path is None and "path" not in columns else None
    if known is not None:
        columns = list(dict.fromkeys([*columns, "path", "caption"]))
    path = _column(source, "path_column", asked.path, layouts.PATHS, columns)
    caption = _column(source, "caption_column", asked.caption, layouts.CAPTIONS, columns)
    _check_otherwise(asked, columns)
    spans = _span_columns(asked, columns, table, known is not None and known.cut)
    names = _Names(table.word, path, caption, *spans)
    own = {*names.columns(), asked.otherwise, *(known.columns if known is not None else ())}

    def read(places: Container[int] | None, cells: Collection[str] | None) -> Iterator[Video]:
        for place, row in table.rows(places, None if cells is None else {*own, *cells}):
            for video in _pieces(place, row if known is None else known.row(row), names):
                yield _captions(video, asked)

    return Listed(source, columns, [], read)


def _check_otherwise(asked: Columns, columns: Sequence[str]) -> None:
    if asked.otherwise not in ("require", "empty", *columns):
        raise DataError(f"captions: {no_column(asked.otherwise, columns)}; or give require or empty")


def _captions(video: Video, asked: Columns) -> Video:
    """The video, one without a caption with what it gets instead."""
    if not video.uncaptioned or asked.otherwise == "require":
        return video
    if asked.otherwise == "empty":
        return video._replace(caption="", problem=None)
    caption, columns = video.columns.get(asked.otherwise), video.columns
    return _video(video.path, caption, columns, video.problem or "", place=video.place, span=video.span)


@dataclass(frozen=True)
class _Names:
    """What a table calls its places, and the columns of its own meaning."""

    place: str
    path: str
    caption: str
    start: str | None
    end: str | None

    def columns(self) -> tuple[str | None, ...]:
        return self.path, self.caption, self.start, self.end


def _span_columns(asked: Columns, columns: Sequence[str], table: Table, cut: bool) -> tuple[str | None, str | None]:
    """The columns of starts and ends; one that usually holds both only where it does, and none of files that are `cut`
    already."""
    for key, name in (("start_column", asked.start), ("end_column", asked.end)):
        if name is not None and name not in columns:
            raise DataError(f"{key}: {no_column(name, columns)}")
    if asked.start or asked.end or cut:
        return asked.start, asked.end
    start, end = usual(columns)
    if start is None or start != end:
        return start, end
    first = next((row for _, row in table.rows(None, (start,)) if row.get(start)), {})
    try:
        return (start, end) if spans_of(first, start, end) else (None, None)
    except DataError:
        return None, None  # a date, for one


def _pieces(place: int, row: Mapping[str, Any], names: _Names) -> list[Video]:
    """A row of a table as videos: one for each piece that it names."""
    try:
        spans = spans_of(row, names.start, names.end) if names.start or names.end else []
        if not spans:
            return [_row(place, row, row.get(names.caption), names)]
        texts = texts_of(row.get(names.caption), len(spans))
    except DataError as error:
        path = row.get(names.path)
        path, problem = path if isinstance(path, str) else "", f"{names.place} {place}: {error}"
        return [Video(path, None, row, problem, None, place)]
    return [_row(place, row, text, names, span) for text, span in zip(texts, spans, strict=True)]


def _row(place: int, row: Mapping[str, Any], caption: Any, names: _Names, span: Span | None = None) -> Video:
    """A row of a table as a video with this caption."""
    path = row.get(names.path)
    if isinstance(path, str) and path.strip():
        missing = f"no caption in the column {names.caption}, {names.place} {place}"
        return _video(path, caption, row, missing, place=place, span=span)
    if path is None or path != path or not str(path).strip():
        problem = f"{names.place} {place} has no path in the column {names.path}"
    else:
        problem = f"{names.place} {place} has a path of type {type(path).__name__}, expected text"
    return Video("", None, row, problem, span, place)


def _video(
    path: str, caption: Any, columns: Mapping[str, Any], missing: str, place: int = 0, span: Span | None = None
) -> Video:
    """A line of the list; a caption that cannot be stored as text is none."""
    text, problem = None, None
    # NaN is how some tables write that nothing is there
    uncaptioned = caption is None or caption != caption or (isinstance(caption, str) and not caption.strip())
    if uncaptioned:
        problem = missing
    elif not isinstance(caption, str):
        problem = f"caption is of type {type(caption).__name__}, expected text"
    elif "\0" in caption:
        problem = "caption holds a zero byte, as UTF-16 does; save it as UTF-8"
    elif not _encodable(caption):
        problem = "caption has half a character (a lone surrogate)"
    else:
        text = caption.strip()
    return Video(path, text, columns, problem, span, place, uncaptioned)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _captioned(path: Path, root: Path) -> Video:
    """A video of a folder, with the caption of its .txt, or of its .json, whose fields are its columns."""
    listed, text = str(path.relative_to(root)), path.with_suffix(".txt")
    try:
        columns = layouts.beside(path)
    except (DataError, OSError) as error:
        problem = f"{path.with_suffix('.json').name} cannot be used: {error}"
        return Video(listed, None, {}, problem)
    try:
        return _video(listed, read_utf8(text), columns, f"no caption, {text.name} is empty")
    except FileNotFoundError:
        named = next((name for name in layouts.CAPTIONS if name in columns), None)
        missing = f"no caption, expected {text.name} beside it"
        return _video(listed, columns[named] if named else None, columns, missing)
    except DataError as error:
        problem = f"caption cannot be used: {str(error).removeprefix(f'{text}: ')}"
    except OSError as error:
        problem = f"caption cannot be read ({error.strerror})"
    return Video(listed, None, columns, problem)


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
