"""Videos that lie inside the rows of a Parquet table, as Hugging Face's datasets store them.

Such a video has the path `TABLE.parquet/ROW/NAME`, rows from 0.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

from data.errors import DataError

SUFFIX = ".parquet"


def packed_columns(schema: Any) -> list[str]:
    """The names of a pyarrow schema's columns whose cells are structs with the bytes of a file and its path."""
    from pyarrow import types

    return [
        field.name
        for field in schema
        if types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
    ]


def packed_path(table: Path, row: int, name: str | None) -> str:
    """What a video in a row is listed as."""
    return f"{table}/{row}/{Path(name).name if name else 'video'}"


def packed(path: Path) -> tuple[Path, int] | None:
    """The table and the row of a path into one; None for any other path."""
    table = path.parent.parent
    return (table, int(path.parent.name)) if table.suffix == SUFFIX and path.parent.name.isdecimal() else None


def unpacked(table: Path, row: int) -> io.BytesIO:
    """The file that a row holds.

    Raises:
        DataError: with the reason alone: it holds none.
        OSError: the table cannot be read.
    """
    from pyarrow import parquet

    with parquet.ParquetFile(table) as file:
        columns = packed_columns(file.schema_arrow)
        if not columns:
            raise DataError(f"{table.name} holds no videos")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                # One row at a time: a group may be gigabytes.
                batches = file.iter_batches(1, row_groups=[group], columns=[f"{columns[0]}.bytes"])
                (batch,) = itertools.islice(batches, row, row + 1)
                content = batch[columns[0]][0]["bytes"].as_py()
                if not content:
                    raise DataError(f"row {row} of {table.name} holds no bytes")
                return io.BytesIO(content)
            row -= rows
    raise DataError(f"{table.name} has no such row")
