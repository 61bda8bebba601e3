"""What every table of videos is, whatever file it lies in."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Container, Iterator
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError

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

    def rows(self, places: Container[int] | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows in the table's order.

        Args:
            places: only those at these places.
            columns: no cell of another column is needed; it may be there.

        Raises:
            DataError: what stands there is no row of the table; it names file and line.
        """
        ...


@contextlib.contextmanager
def reading(source: Path) -> Iterator[None]:
    """Inside, what a library or the system says of a file that it cannot read names the file."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: cannot be read as {source.suffix.lower()[1:]} ({error})") from error
