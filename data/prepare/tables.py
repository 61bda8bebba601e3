"""Tables of videos, read strictly: CSV, TSV, JSON, JSON lines and Parquet, every row with its place for errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import lines_of, read_utf8
from data.prepare.folder import SUFFIXES as VIDEOS
from data.prepare.packed import packed_columns, packed_path

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
LONGEST = 1 << 24  # characters of a field; more are an unclosed quote

Row = tuple[str, dict[str, Any]]
"""Where a row stands, such as `line 7`, and its cells by column."""


def read_table(source: Path) -> list[Row]:
    """The rows of a table, in its order.

    Raises:
        DataError: no such file, another kind of file, or a line that is none of the table; it names file and line.
    """
    suffix = source.suffix.lower()
    if not source.exists():
        raise DataError(f"{source}: no such folder or table; correct source=")
    if suffix not in SUFFIXES:
        raise DataError(f"{source}: unknown kind of list, expected a folder, .csv, .tsv, .json, .jsonl or .parquet")
    try:
        if suffix == ".parquet":
            return _parquet_rows(source)
        text = read_utf8(source)
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: cannot be read as {suffix[1:]} ({error})") from error
    if suffix in (".csv", ".tsv"):
        return list(_csv_rows(source, text, "\t" if suffix == ".tsv" else ","))
    return _json_table(source, text) if suffix == ".json" else list(_json_rows(source, text))


def _csv_rows(source: Path, text: str, delimiter: str) -> Iterator[Row]:
    """The rows below the first, which names the columns; a field between double quotes may go over several lines."""
    csv.field_size_limit(LONGEST)
    lines = [line + "\n" for line in text.split("\n")]
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    name = "a tab" if delimiter == "\t" else "a comma"
    advice = f"put what holds {name}, a quote or a line break between double quotes, and double the quotes in it"
    columns: list[str] = []
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{source}: {_csv_mistake(str(error), first, reader.line_num)}; {advice}") from error
        if cells is None:
            return
        if not cells:
            continue
        if not columns:
            columns = cells
            twice = next((column for column in columns if columns.count(column) > 1), None)
            if twice is not None:
                raise DataError(f"{source}: line {first} names the column {twice!r} twice; name each once")
            continue
        if len(cells) != len(columns):
            found = f"{len(cells)} field{'s' * (len(cells) != 1)}"
            raise DataError(
                f"{source}: line {reader.line_num} has {found}, the first line names {len(columns)} columns; {advice}"
            )
        swallowed = _swallowed(lines[first : reader.line_num], delimiter, columns)
        if swallowed is not None:
            raise DataError(
                f"{source}: a quote opened in line {first} closes in line {reader.line_num} only, and line "
                f"{first + 1 + swallowed} between them looks like a row; close it where its text ends, and {advice}"
            )
        yield f"line {first}", dict(zip(columns, cells, strict=True))


def _csv_mistake(said: str, first: int, last: int) -> str:
    """What the csv module says of the row that begins in line `first`, in plain words."""
    if "unexpected end of data" in said or "field larger than" in said:
        return f"a quote opened in line {first} is never closed"
    if "new-line character" in said:
        return f"line {last} holds a carriage return outside quotes, and only a line feed ends a line"
    if "expected after" in said:
        opened = f", and the quotes of the row that begins in line {first} are out of step" if first != last else ""
        return f"line {last} goes on behind a closing quote{opened}"
    return f"line {last} is not of the format ({said})"


def _swallowed(lines: list[str], delimiter: str, columns: list[str]) -> int | None:
    """Which of the further lines of a row looks like a row of its own: a quote was not closed before it.

    Such a line has as many fields as there are columns, the path's place holds a video's name, and no quote is left
    open in it.
    """
    for number, line in enumerate(lines):
        cells = line.rstrip("\r\n").split(delimiter)
        if len(cells) >= len(columns) > 1 and any(cell.strip('" ').lower().endswith(VIDEOS) for cell in cells):
            return number
    return None


def _json_rows(source: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}: line {number} is not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise DataError(f"{source}: line {number} is not an object, expected {{...}} on each line")
        yield f"line {number}", row


def _json_table(source: Path, text: str) -> list[Row]:
    """A list of objects, or one object for each path."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{source}: is not JSON ({error.msg} in line {error.lineno}, column {error.colno}); for an object on each "
            "line name it .jsonl"
        ) from error
    if isinstance(found, dict) and found and all(isinstance(row, dict) for row in found.values()):
        found = [{"path": path, **row} for path, row in found.items()]
    if not isinstance(found, list):
        raise DataError(f"{source}: is {type(found).__name__}, expected a list of objects [{{...}}, ...]")
    for number, row in enumerate(found, 1):
        if not isinstance(row, dict):
            raise DataError(f"{source}: entry {number} is {row!r:.60}, expected an object {{...}}")
    return [(f"entry {number}", row) for number, row in enumerate(found, 1)]


def _parquet_rows(source: Path) -> list[Row]:
    """Binary cells that hold UTF-8 are text: many writers do not say that a column of theirs is. Of cells that hold
    whole files the bytes are left where they are."""
    from pyarrow import parquet

    with parquet.ParquetFile(source) as file:
        inside = packed_columns(file.schema_arrow)
        names = [f"{name}.path" if name in inside else name for name in file.schema_arrow.names]
        rows = file.read(names).to_pylist()
    for number, row in enumerate(rows):
        for name in inside:
            row[name] = packed_path(source, number, (row[name] or {}).get("path"))
    return [
        (f"row {number}", {name: _as_text(cell) for name, cell in row.items()}) for number, row in enumerate(rows, 1)
    ]


def _as_text(cell: Any) -> Any:
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            pass
    return cell
