"""Tables of videos, read strictly: CSV, TSV, JSON, JSON lines and Parquet, every row with its place for errors.

A table of millions of rows is never held: its rows are read from the file each time that they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import read_utf8, utf8_lines
from data.prepare.csv_table import CsvTable
from data.prepare.parquet_table import ParquetTable
from data.prepare.table import Row, Table, reading

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


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
    with reading(source):
        if suffix == ".parquet":
            return ParquetTable([source], source.parent)
        if suffix in (".csv", ".tsv"):
            return CsvTable(source, "\t" if suffix == ".tsv" else ",")
        return HeldTable("entry", _json_rows(source)) if suffix == ".json" else JsonLinesTable(source)


class HeldTable:
    """Rows that are in memory, numbered from 1."""

    def __init__(self, word: str, rows: Sequence[dict[str, Any]]) -> None:
        self.word = word
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self._rows = rows

    def rows(self, places: Container[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        return (row for row in enumerate(self._rows, 1) if places is None or row[0] in places)


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

    def rows(self, places: Container[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        with reading(self._source):
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
