"""Which shards a run began: only these may be removed by the next one.

The name of each shard goes into a file before the shard itself is made. A tar that no such file and no record names is
somebody's finished work, as far as anyone can know, and is never removed.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from data.errors import DataError
from data.io.files import temporary


class Begun:
    """The names of the shards that were begun, one a line of the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def names(self) -> list[str]:
        """The names so far; a line that a kill left half written is none."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return text.split("\n")[:-1]

    def add(self, name: str) -> None:
        """A shard of this name is about to be made."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())

    def clear(self, folder: Path, finished: Collection[str] = ()) -> None:
        """Remove what was begun in `folder` and not finished, and forget it."""
        for name in self.names():
            temporary(folder / name).unlink(missing_ok=True)
            if name not in finished:
                (folder / name).unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Remove the file of names."""
        self._path.unlink(missing_ok=True)


def shards_in(folder: Path) -> list[str]:
    """The names of the tars in a folder, in their order."""
    return sorted(path.name for path in folder.glob("shard-*.tar"))


def refuse_shards(folder: Path, begun: Iterable[str] = ()) -> None:
    """Raise a DataError where the folder holds shards besides those that were begun: nothing says whose they are."""
    known = set(begun)
    others = [name for name in shards_in(folder) if name not in known] if folder.is_dir() else []
    if others:
        more = f" and {len(others) - 1} more shards" if len(others) > 1 else ""
        raise DataError(
            f"{folder}: holds {others[0]}{more}, but no manifest and no journal that names them; they stay as they "
            f"are. `python -m data.check {folder} --rebuild` makes a manifest of them; or choose another folder, or "
            "delete them"
        )
