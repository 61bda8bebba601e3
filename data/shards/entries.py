"""Which files of a tar belong to which sample, as WebDataset has it.

A file's name up to the first dot after its last slash is its sample's key; what follows the dot is the entry's name,
such as `latent.npy`. The files of a sample lie one behind the other.
"""

from __future__ import annotations

import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

_NAME = re.compile(r"(?P<key>(?:.*/)?[^./]*)\.(?P<entry>[^/]+)")


@dataclass(frozen=True)
class Entry:
    """A file of a tar: its header begins at byte `start`, its content at `first`, which ends before `last`."""

    name: str
    start: int
    first: int
    last: int


@dataclass(frozen=True)
class Group:
    """A sample's files, in the order of the tar; `key` as `Sample.key` allows it, other characters as underscores."""

    key: str
    entries: tuple[Entry, ...]


def groups_of(path: Path) -> Iterator[Group]:
    """The samples of a tar; files whose name has no dot or begins with one belong to none.

    Raises:
        DataError: it is no tar, is compressed, or ends before a file in it does.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            files = [(_NAME.fullmatch(member.name.removeprefix("./")), member) for member in tar if member.isfile()]
    except tarfile.TarError as error:
        hint = "copy it again, or unpack it where it is compressed"
        raise DataError(f"{path}: is no whole tar ({error}); {hint}") from error
    members = [(name, member) for name, member in files if name is not None]
    size = path.stat().st_size
    for key, group in itertools.groupby(members, key=lambda member: member[0]["key"]):
        if not key or key.endswith("/"):
            continue
        entries = tuple(Entry(f["entry"], m.offset, m.offset_data, m.offset_data + m.size) for f, m in group)
        if entries[-1].last > size:
            raise DataError(f"{path}: ends before its sample {key} does; copy it again")
        yield Group(re.sub(r"[^A-Za-z0-9_\-]", "_", key), entries)
