"""Writing files so that a kill at any moment leaves the old file, the new file or none, never half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO


def temporary(path: Path) -> Path:
    """The hidden name beside `path` under which it is written until `commit` gives it its own."""
    return path.with_name(f".{path.name}.tmp")


def commit(file: BinaryIO, path: Path) -> None:
    """Close `file`, which was written beside `path`, and make it `path`, both safe on disk when this returns."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    Path(file.name).replace(path)
    # The new name is an entry of the folder, which has to reach the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
