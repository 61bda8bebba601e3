"""Tables in Parquet, whose cells may hold the videos themselves."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.prepare.packed import packed_columns, packed_path
from data.prepare.table import Row, reading

BATCH = 512  # rows that are in memory at once


class ParquetTable:
    """Rows from 1, of one file or of several that follow each other.

    Binary cells that hold UTF-8 are text: many writers do not say that a column of theirs is. Of cells that hold whole
    files the bytes are left where they are.

    Args:
        sources: the files.
        root: the folder that the paths of files in cells are relative to.
    """

    word = "row"

    def __init__(self, sources: Sequence[Path], root: Path) -> None:
        from pyarrow import parquet

        self._sources, self._root = sources, root
        self._inside: dict[Path, list[str]] = {}
        names: dict[str, None] = {}
        for source in sources:
            with reading(source), parquet.ParquetFile(source) as file:
                names.update(dict.fromkeys(file.schema_arrow.names))
                self._inside[source] = packed_columns(file.schema_arrow)
        self.columns = list(names)

    def rows(self, places: Container[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """As of every `Table`."""
        from pyarrow import parquet

        before = 0
        for source in self._sources:
            with reading(source), parquet.ParquetFile(source, pre_buffer=False) as file:
                yield from self._rows_of(source, file, before, places, columns)
                before += file.metadata.num_rows

    def _rows_of(
        self, source: Path, file: Any, before: int, places: Container[int] | None, columns: Collection[str] | None
    ) -> Iterator[Row]:
        """The rows of a file, behind so many of the earlier ones."""
        import pyarrow

        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        inside = self._inside[source]
        read = [f"{name}.path" if name in inside else name for name in names]
        first = 0
        for batch in file.iter_batches(BATCH, columns=read):
            count = batch.num_rows  # not always as many as asked for: fewer where a group of rows ends
            numbers: Sequence[int] = range(first, first + count)
            if places is not None:
                numbers = [number for number in numbers if before + number + 1 in places]
                batch = batch.take(pyarrow.array([number - first for number in numbers], pyarrow.int64()))
            first += count
            cells = []
            for name in names:
                found = batch.column(name).to_pylist()
                if name in inside:
                    paths = [(cell or {}).get("path") for cell in found]
                    table = source.relative_to(self._root)
                    found = [packed_path(table, n, path) for n, path in zip(numbers, paths, strict=True)]
                elif bytes in map(type, found):
                    found = [_as_text(cell) for cell in found]
                cells.append(found)
            for place, number in enumerate(numbers):
                yield before + number + 1, {name: cell[place] for name, cell in zip(names, cells, strict=True)}


def _as_text(cell: Any) -> Any:
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError:
            pass
    return cell
