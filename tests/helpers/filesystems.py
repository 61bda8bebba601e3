"""File systems that lack something: folders that cannot be synced (CIFS), files that cannot be locked (Lustre)."""

from __future__ import annotations

import errno
import fcntl
import os
import runpy
import stat
import sys
from collections.abc import Callable
from typing import Any

NO_SYNC, NO_LOCKS = (errno.EINVAL, errno.ENOTSUP), (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def no_sync(number: int) -> Callable[[int], None]:
    """An `os.fsync` that fails with this number for folders, and syncs files."""
    fsync = os.fsync

    def fails(descriptor: Any) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return fails


def no_locks(number: int) -> Callable[..., None]:
    """An `fcntl.flock` that fails with this number."""

    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fails


if __name__ == "__main__":
    # MODULE WORDS...: a command where nothing can be locked and no folder synced
    fcntl.flock, os.fsync = no_locks(errno.ENOSYS), no_sync(errno.EINVAL)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
