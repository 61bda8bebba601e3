"""Tables of videos, read strictly: CSV, TSV, JSON, JSON lines and Parquet, every row with its place for errors.

A table of millions of rows is never held: its rows are read from the file each time that they are asked for.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError
from data.io.lines import read_utf8, utf8_lines
from data.prepare.folder import SUFFIXES as VIDEOS
from data.prepare.packed import packed_columns, packed_path

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
LONGEST = 1 << 24  # characters of a field; more are an unclosed quote
BATCH = 512  # rows of a Parquet table that are in memory at once

Row = tuple[int, dict[str, Any]]
"""The number of a row's place, such as that of its line, and its cells by column."""


class Table(Protocol):
    """A table in a file.

    Attributes:
        word: what its places are called, such as `line`.
        columns: the names of all columns, in the order in which they come.
    """

    word: str
    columns: list[str]

    def rows(self, places: Collection[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows in the table's order.

        Args:
            places: only those at these places.
            columns: no cell of another column is needed; it may be there.

        Raises:
            DataError: what stands there is no row of the table; it names file and line.
        """
        ...


def open_table(source: Path) -> Table:
    """The table in a file.

    Raises:
        DataError: no such file, another kind of file, or one whose columns cannot be read.
    """
    suffix = source.suffix.lower()
    if not source.exists():
        raise DataError(f"{source}: no such folder or table; correct source=")
    if suffix not in SUFFIXES:
        raise DataError(f"{source}: unknown kind of list, expected a folder, .csv, .tsv, .json, .jsonl or .parquet")
    with _reading(source):
        if suffix == ".parquet":
            return ParquetTable(source)
        if suffix in (".csv", ".tsv"):
            return CsvTable(source, "\t" if suffix == ".tsv" else ",")
        return HeldTable("entry", _json_rows(source)) if suffix == ".json" else JsonLinesTable(source)


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Inside, what a library or the system says of a file that it cannot read names the file."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: cannot be read as {source.suffix.lower()[1:]} ({error})") from error


class HeldTable:
    """Rows that are in memory, numbered from 1."""

    def __init__(self, word: str, rows: Sequence[dict[str, Any]]) -> None:
        self.word = word
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self._rows = rows

    def rows(self, places: Collection[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        return (row for row in enumerate(self._rows, 1) if places is None or row[0] in places)


class CsvTable:
    """The rows below the first, which names the columns; a field between double quotes may go over several lines."""

    word = "line"

    def __init__(self, source: Path, delimiter: str) -> None:
        self._source, self._delimiter = source, delimiter
        between = "a tab" if delimiter == "\t" else "a comma"
        self._advice = (
            f"put what holds {between}, a quote or a line break between double quotes, and double the quotes in it"
        )
        first, self.columns = next(self._records(), (1, []))
        twice = next((column for column in self.columns if self.columns.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"{source}: line {first} names the column {twice!r} twice; name each once")

    def rows(self, places: Collection[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        records, names = self._records(), self.columns
        next(records, None)
        for place, cells in records:
            if places is None or place in places:
                yield place, dict(zip(names, cells, strict=True))

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The cells of each row, that of the names too, with the line that it begins in."""
        csv.field_size_limit(LONGEST)
        source, width = self._source, 0
        lines: list[str] = []  # of the row that is read
        reader = csv.reader(self._lines(lines), delimiter=self._delimiter, strict=True)
        first = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{source}: {_mistake(str(error), first, reader.line_num)}; {self._advice}") from error
            if cells is None:
                return
            if cells:
                width = width or len(cells)
                if len(cells) != width:
                    found = f"{len(cells)} field{'s' * (len(cells) != 1)}"
                    raise DataError(
                        f"{source}: line {reader.line_num} has {found}, the first line names {width} columns; "
                        f"{self._advice}"
                    )
                swallowed = _swallowed(lines[1:], self._delimiter, width) if len(lines) > 1 else None
                if swallowed is not None:
                    raise DataError(
                        f"{source}: a quote opened in line {first} closes in line {reader.line_num} only, and line "
                        f"{first + 1 + swallowed} between them looks like a row; close it where its text ends, and "
                        f"{self._advice}"
                    )
                yield first, cells
            lines.clear()
            first = reader.line_num + 1

    def _lines(self, taken: list[str]) -> Iterator[str]:
        with _reading(self._source):
            for line in utf8_lines(self._source):
                taken.append(line)
                yield line


def _mistake(said: str, first: int, last: int) -> str:
    """What the csv module says of the row that begins in line `first`, in plain words."""
    if "unexpected end of data" in said or "field larger than" in said:
        return f"a quote opened in line {first} is never closed"
    if "new-line character" in said:
        return f"line {last} holds a carriage return outside quotes, and only a line feed ends a line"
    if "expected after" in said:
        opened = f", and the quotes of the row that begins in line {first} are out of step" if first != last else ""
        return f"line {last} goes on behind a closing quote{opened}"
    return f"line {last} is not of the format ({said})"


def _swallowed(lines: Sequence[str], delimiter: str, columns: int) -> int | None:
    """Which of the further lines of a row looks like a row of its own: a quote was not closed before it.

    Such a line has as many fields as there are columns, the path's place holds a video's name, and no quote is left
    open in it.
    """
    for number, line in enumerate(lines):
        cells = line.rstrip("\r\n").split(delimiter)
        if len(cells) >= columns > 1 and any(cell.strip('" ').lower().endswith(VIDEOS) for cell in cells):
            return number
    return None


class JsonLinesTable:
    """An object on each line that is not empty; its keys are columns."""

    word = "line"

    def __init__(self, source: Path) -> None:
        self._source = source
        found: dict[str, None] = {}
        for _, row in self.rows():
            if not row.keys() <= found.keys():
                found.update(dict.fromkeys(row))
        self.columns = list(found)

    def rows(self, places: Collection[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        with _reading(self._source):
            for number, line in enumerate(utf8_lines(self._source), 1):
                if (places is None or number in places) and line.strip():
                    yield number, self._row(number, line)

    def _row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            found = f"{error.msg} at column {error.colno}"
            raise DataError(f"{self._source}: line {number} is not JSON ({found})") from error
        if not isinstance(row, dict):
            raise DataError(f"{self._source}: line {number} is not an object, expected {{...}} on each line")
        return row


def _json_rows(source: Path) -> list[dict[str, Any]]:
    """A list of objects, or one object for each path."""
    try:
        found = json.loads(read_utf8(source))
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
    return found


class ParquetTable:
    """Rows from 1. Binary cells that hold UTF-8 are text: many writers do not say that a column of theirs is. Of cells
    that hold whole files the bytes are left where they are."""

    word = "row"

    def __init__(self, source: Path) -> None:
        from pyarrow import parquet

        self._source = source
        with parquet.ParquetFile(source) as file:
            self.columns = file.schema_arrow.names
            self._inside = packed_columns(file.schema_arrow)

    def rows(self, places: Collection[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        import pyarrow
        from pyarrow import parquet

        names = [name for name in self.columns if columns is None or name in columns]
        read = [f"{name}.path" if name in self._inside else name for name in names]
        first = 1
        with _reading(self._source), parquet.ParquetFile(self._source, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=read):
                numbers: Sequence[int] = range(first, first + batch.num_rows)
                if places is not None:
                    numbers = [number for number in numbers if number in places]
                    batch = batch.take(pyarrow.array([number - first for number in numbers], pyarrow.int64()))
                first += BATCH
                cells = [self._cells(name, batch.column(name).to_pylist(), numbers) for name in names]
                for number, row in zip(numbers, zip(*cells, strict=True), strict=True):
                    yield number, dict(zip(names, row, strict=True))

    def _cells(self, name: str, cells: list[Any], numbers: Sequence[int]) -> list[Any]:
        if name in self._inside:
            files = zip(numbers, cells, strict=True)
            return [packed_path(self._source, number - 1, (cell or {}).get("path")) for number, cell in files]
        return [_as_text(cell) for cell in cells] if bytes in map(type, cells) else cells


def _as_text(cell: Any) -> Any:
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            pass
    return cell
