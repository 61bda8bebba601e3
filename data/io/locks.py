"""Locks on files between processes, and what is left of them on file systems that have none.

Lustre without its `flock` option, some NFS servers and some shared folders of virtual machines have no locks. There a
lock cannot be had, which is another thing than that somebody else has it: work goes on, and what a second process would
break goes unnoticed.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import tempfile
import time
from pathlib import Path
from typing import IO, Any

_NONE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
log = logging.getLogger(__name__)
warned: set[Path] = set()  # folders of which it was said


class Lock(enum.Enum):
    """What came of asking for a lock."""

    OURS = "ours"
    HELD = "held"  # another process has it
    NONE = "none"  # the file system has no locks


def take(file: IO[Any], *, shared: bool = False, wait: bool = False, seconds: float = 0.0) -> Lock:
    """Lock an open file for this process, until it is closed or the process ends, however it ends.

    Args:
        file: it lies on the file system that is asked.
        shared: others may share it.
        wait: until it can be had; else it is asked for as many `seconds`.

    Raises:
        OSError: neither of the three came of it.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            return Lock.OURS
        except BlockingIOError:
            if time.monotonic() >= end:
                return Lock.HELD
            time.sleep(0.05)
        except OSError as error:
            if error.errno in _NONE:
                return Lock.NONE
            raise


def has_locks(folder: Path) -> bool:
    """Whether files in a folder can be locked.

    Raises:
        OSError: no file can be made there.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        return take(file) is not Lock.NONE


def say_no_locks(folder: Path, unnoticed: str) -> None:
    """Warn, once for each folder, that its file system has no locks, and of what goes unnoticed therefore."""
    if folder not in warned:
        warned.add(folder)
        log.warning("%s: its file system has no locks: %s would go unnoticed", folder, unnoticed)
