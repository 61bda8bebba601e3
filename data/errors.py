"""The error that a user's mistake in the data raises; errors of the system, with the file that they are about."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from radial.errors import Mistake

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DataError(Mistake):
    """A mistake in the data or in what was asked of it: the message names the file or key, what was found, what was
    expected and what to do, in one line: line breaks, as in messages of libraries, are taken out."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class BadSampleError(DataError):
    """A sample whose bytes arrived, but are not what the manifest lists; the others of its shard may be good."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError that names no file, as that of a full disk, gets this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def explained(error: OSError) -> str:
    """An error of the system in a line that says what to do where the disk is full."""
    if error.errno not in FULL:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}cannot be written ({error.strerror}); make room, then start the same command again"
