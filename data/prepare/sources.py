"""Lists of videos: a folder with captions in .txt files, or a CSV, JSONL or Parquet table; filters and ranking."""

from __future__ import annotations

import csv
import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv")
PATH_COLUMNS = ("path", "video", "video_path", "file", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "text", "prompt")
PROBED = ("frames", "seconds", "fps", "width", "height", "aspect")
"""What a condition may ask for without a column of that name: it is then read from the video."""

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|!=|==|>|<|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class Video:
    """A line of the list: the path as listed, the caption (None where there is no text), and all columns.

    `uncaptioned` says why there is no caption.
    """

    path: str
    caption: str | None
    columns: Mapping[str, Any]
    uncaptioned: str = "no caption"


@dataclass(frozen=True)
class Condition:
    """`column operator value`, such as `score > 4.5`; numbers are compared as numbers."""

    column: str
    symbol: str
    value: str

    def holds(self, columns: Mapping[str, Any]) -> bool:
        """Whether it holds for these columns; a value that is missing or no number holds for nothing but `!=`.

        true and false are the same in capitals, as tables write them in many ways.
        """
        compare, found = _OPERATORS[self.symbol], columns.get(self.column)
        wanted = number(self.value)
        if wanted is not None:
            actual = number(found)
            return self.symbol == "!=" if actual is None else compare(actual, wanted)
        text, value = "" if found is None else str(found), self.value
        if value.lower() in ("true", "false"):
            text, value = text.lower(), value.lower()
        return compare(text, value)


def number(value: Any) -> float | None:
    """The value as a finite number, or None."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def parse_conditions(text: str) -> list[Condition]:
    """`score>4.5, width>=1280 and camera=static` as conditions, all of which must hold.

    Raises:
        DataError: a part that is no condition, or that orders by something that is no number.
    """
    conditions = []
    for part in re.split(r",|\s+and\s+", text):
        match = _CONDITION.fullmatch(part)
        if match is None or match[3][0] in "<>=!":  # `=>` is no operator
            raise DataError(f"where: {part.strip()!r} is not a condition, expected such as score>4.5 or camera=static")
        condition = Condition(*match.groups())
        if condition.symbol in (">=", "<=", ">", "<") and number(condition.value) is None:
            raise DataError(f"where: {part.strip()!r} compares with {condition.value!r}, expected a number")
        conditions.append(condition)
    return conditions


def split_conditions(conditions: Sequence[Condition], columns: Collection[str]) -> tuple[list[Condition], ...]:
    """Those on the table's columns, and those on what only the video itself tells (`PROBED`).

    Raises:
        DataError: a condition on neither.
    """
    for condition in conditions:
        if condition.column not in columns and condition.column not in PROBED:
            raise DataError(f"where: {_no_column(condition.column, [*columns, *PROBED])}")
    table = [condition for condition in conditions if condition.column in columns]
    return table, [condition for condition in conditions if condition.column not in columns]


def ranked(videos: Sequence[Video], sort: str, columns: Collection[str]) -> list[Video]:
    """Highest first by a column, or by the sum of several joined by `+`; lines without the numbers come last.

    Raises:
        DataError: an unknown column.
    """
    # A column's own name may hold a plus.
    names = [sort] if sort in columns else [name.strip() for name in sort.split("+")]
    for name in names:
        if name not in columns:
            raise DataError(f"sort: {_no_column(name, columns)}")

    def score(video: Video) -> float:
        values = [number(video.columns.get(name)) for name in names]
        return -math.inf if None in values else sum(value for value in values if value is not None)

    return sorted(videos, key=score, reverse=True)


def read_source(
    source: Path, path_column: str | None = None, caption_column: str | None = None
) -> tuple[list[Video], list[str]]:
    """The list of videos and the names of its columns.

    Args:
        source: a folder, searched with all folders in it for videos with a .txt file of the same name beside them, but
            for hidden ones; or a .csv, .tsv, .jsonl or .parquet table.
        path_column, caption_column: of a table; None takes the first of `PATH_COLUMNS` and `CAPTION_COLUMNS` there.

    Raises:
        DataError: no such source, not a table, a line that is none of the table, a column that is not there, or nothing
            in it.
    """
    if source.is_dir():
        paths = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in SUFFIXES]
        # macOS puts a ._NAME of its own beside files on disks that are not its own.
        shown = [path for path in paths if not any(part[0] == "." for part in path.relative_to(source).parts)]
        videos = [_captioned(path, source) for path in shown]
        if not videos:
            raise DataError(f"{source}: no videos in this folder, expected files that end in {', '.join(SUFFIXES)}")
        return videos, []
    rows = _table(source)
    if not rows:
        raise DataError(f"{source}: the table is empty, expected a line for each video")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path_name = _column(source, "path_column", path_column, PATH_COLUMNS, columns)
    caption_name = _column(source, "caption_column", caption_column, CAPTION_COLUMNS, columns)
    return [_video(str(row.get(path_name) or ""), row.get(caption_name), row) for row in rows], columns


def _video(path: str, caption: Any, columns: Mapping[str, Any]) -> Video:
    """A line of the list; a caption that cannot be stored as text is none."""
    if caption is None or caption != caption:  # NaN is how some tables write that nothing is there
        return Video(path, None, columns)
    if not isinstance(caption, str):
        return Video(path, None, columns, f"caption is of type {type(caption).__name__}, expected text")
    try:
        caption.encode()
    except UnicodeEncodeError:
        return Video(path, None, columns, "caption has half a character (a lone surrogate)")
    return Video(path, caption.strip() or None, columns)


def _captioned(path: Path, root: Path) -> Video:
    listed = str(path.relative_to(root))
    try:
        # Windows' editors put a mark in front.
        return _video(listed, path.with_suffix(".txt").read_text(encoding="utf-8-sig"), {})
    except FileNotFoundError:
        return Video(listed, None, {})
    except UnicodeDecodeError:
        return Video(listed, None, {}, "caption is not UTF-8")
    except OSError as error:
        return Video(listed, None, {}, f"caption cannot be read ({error.strerror})")


def _table(source: Path) -> list[dict[str, Any]]:
    suffix = source.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return list(_csv_rows(source, "\t" if suffix == ".tsv" else ","))
        if suffix in (".jsonl", ".ndjson"):
            return list(_json_rows(source))
        if suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_table(source).to_pylist()
    except FileNotFoundError as error:
        raise DataError(f"{source}: no such folder or table; correct source=") from error
    except DataError:
        raise
    except (ValueError, csv.Error, OSError) as error:
        raise DataError(f"{source}: cannot be read as {suffix[1:]} ({error})") from error
    if not source.exists():
        raise DataError(f"{source}: no such folder or table; correct source=")
    raise DataError(f"{source}: unknown kind of list, expected a folder, .csv, .tsv, .jsonl or .parquet")


def _csv_rows(source: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 24)
    with source.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        for row in rows:
            given = [value for value in row.values() if value is not None]
            if None in row or len(given) < len(row):
                columns = len(rows.fieldnames or ())
                found = columns + len(row[None]) if None in row else len(given)  # type: ignore[call-overload]
                name = "a tab" if delimiter == "\t" else "a comma"
                raise DataError(
                    f"{source}: line {rows.line_num} has {found} field{'s' * (found != 1)}, the first line names "
                    f"{columns} columns; put what holds {name}, a quote or a line break between double quotes, and "
                    "double the quotes in it"
                )
            yield row


def _json_rows(source: Path) -> Iterator[dict[str, Any]]:
    with source.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source}: line {number} is not JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise DataError(f"{source}: line {number} is not an object, expected {{...}} on each line")
            yield row


def _column(source: Path, key: str, asked: str | None, usual: Sequence[str], columns: Sequence[str]) -> str:
    if asked is not None:
        if asked not in columns:
            raise DataError(f"{key}: {_no_column(asked, columns)}")
        return asked
    for name in usual:
        if name in columns:
            return name
    found = ", ".join(columns)
    raise DataError(f"{source}: no column named {' or '.join(usual)}, found {found}; give {key}=NAME")


def _no_column(name: str, columns: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(columns), n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return f"there is no column {name!r}, found {', '.join(columns) or 'none'}{guess}"
