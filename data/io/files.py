"""Writing files so that a kill at any moment leaves the old file, the new file or none, never half of one."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from pathlib import Path
from typing import BinaryIO

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
log = logging.getLogger(__name__)
_told: set[int] = set()  # file systems whose folders cannot be synced, by device number


def temporary(path: Path) -> Path:
    """The hidden name beside `path` under which it is written until `commit` gives it its own."""
    return path.with_name(f".{path.name}.tmp")


def commit(file: BinaryIO, path: Path) -> None:
    """Close `file`, which was written beside `path`, and make it `path`, both safe on disk when this returns."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    rename(Path(file.name), path)


def rename(source: Path, path: Path) -> None:
    """Give a file or folder, whose content is on disk, another name in its folder, which is on disk when this returns.

    What has that name already is replaced; a folder only by another, and when it is empty.
    """
    source.replace(path)
    sync_folder(path.parent)  # the new name is an entry of the folder, which has to reach the disk too


def sync_file(path: Path) -> None:
    """Wait until a file's content is on disk; or a folder's entries, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on disk.

    Some file systems cannot do that, CIFS and some shared folders of virtual machines: it is told once, and work goes
    on. What was renamed there is whole under its old name or its new one all the same, unless the power goes.
    """
    if can_sync(folder):
        return
    device = folder.stat().st_dev
    if device not in _told:
        _told.add(device)
        log.warning("%s: its file system syncs no folders; a power cut may lose what was last renamed", folder)


def can_sync(folder: Path) -> bool:
    """Whether a folder's entries reach the disk when they are asked to; those there are do."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno in _NO_SYNC:
            return False
        raise
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` under a temporary name, sync it, rename it; several processes may do so at once."""
    file = temporary(path.with_name(f"{path.name}.{secrets.token_hex(4)}")).open("wb")
    try:
        file.write(content)
        commit(file, path)
    except BaseException:
        try:
            with contextlib.suppress(OSError):  # it writes what is left, which fails on a full disk as it failed before
                file.close()
        finally:
            Path(file.name).unlink(missing_ok=True)
        raise
