"""Tables in CSV and TSV, read strictly: a quote that is not closed would make two rows one."""

from __future__ import annotations

import csv
from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path

from data.errors import DataError
from data.io.lines import utf8_lines
from data.prepare.folder import SUFFIXES as VIDEOS
from data.prepare.table import Row, reading

LONGEST = 1 << 24  # characters of a field; more are an unclosed quote


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

    def rows(self, places: Container[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
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
        with reading(self._source):
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
