"""Writing files and folders so that a kill at any moment leaves the old, the new or none, never half of one.

`beside` is how the whole project does it. Shards, which are written over hours by one process that knows their names,
have a `temporary` name of their own, so that the process that comes after a kill finds and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
log = logging.getLogger(__name__)
warned: set[int] = set()  # file systems whose folders cannot be synced, by device number


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

    Some file systems cannot do that, CIFS and some shared folders of virtual machines: it is logged once, and work goes
    on. What was renamed there is whole under its old name or its new one all the same, unless the power goes.
    """
    if can_sync(folder):
        return
    device = folder.stat().st_dev
    if device not in warned:
        warned.add(device)
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


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`: the file or folder that is written under it becomes `path` when the block ends well.

    Everything is synced first, where the file system can do that, and what `path` was before is replaced. When the
    block fails, what it wrote is removed and `path` stays as it was. Several processes may do so at once. A killed one
    leaves a name that begins with a dot and ends in `.tmp`; or in `.old`, a folder that was being replaced.
    """
    token = secrets.token_hex(4)
    fresh, old = (path.with_name(f".{path.name}.{token}.{kind}") for kind in ("tmp", "old"))
    try:
        yield fresh
        _sync_content(fresh)
        if fresh.is_dir() and path.exists():  # a folder only takes the place of an empty one
            path.rename(old)
        try:
            rename(fresh, path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)


def _sync_content(path: Path) -> None:
    """Wait until a file, or all that is in a folder, is on disk, where the file system can do that."""
    inside = [each for each in path.rglob("*") if not each.is_symlink()] if path.is_dir() else []
    for each in (*inside, path):
        if each.is_dir():
            sync_folder(each)
            continue
        try:
            sync_file(each)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, see `beside`."""
    with beside(path) as fresh:
        fresh.write_bytes(content)


def write_utf8(path: Path, content: str) -> None:
    """Write a file in UTF-8, whole or not at all, see `beside`."""
    write_bytes(path, content.encode())
