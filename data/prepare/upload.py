"""Shards that move to an object store as they are finished: `upload=s3://bucket/shards` of `data.prepare`.

Object stores cannot rename, which is how a shard is finished, and have no locks. So the shard in work and the journal
lie in the folder of this machine, and each finished shard is copied before its record is written and removed after it:
a kill in between leaves a copy without a record, which is made anew under the same name. The manifest goes last, and
until it is there nobody reads the shards. A store shows an object once all of it has arrived.
"""

from __future__ import annotations

import errno
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec.core
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from data.errors import DataError
from data.io.faults import client_errors, reason_of
from data.io.retry import persistently
from data.shards.manifest import EMPTY_PROMPT, FILE, REJECTED
from data.shards.origins import LIST

T = TypeVar("T")
_BESIDE = (LIST, REJECTED, EMPTY_PROMPT, FILE)  # the shards; the manifest says that all is there


class Upload:
    """A folder of an object store that shards go to.

    Args:
        address: anything that fsspec lists, writes and deletes, such as ``s3://bucket/shards``.

    Attributes:
        address: what manifests and messages name: without a password or a slash at its end; a path is absolute.

    Raises:
        DataError: it is empty, no file system is known for it, its package is not installed, or its server refuses.
    """

    def __init__(self, address: str) -> None:
        self.address = re.sub(r"(://[^/:@]*):[^/]*@", r"\1@", address.rstrip("/"))
        if not address.rpartition("://")[2].strip("/"):
            raise DataError(
                f"upload is {address or 'empty'}, expected the address of a folder such as s3://bucket/shards; is a "
                "variable of the shell not set?"
            )
        self._url = address.rstrip("/")
        try:
            with client_errors():
                system, self._root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"upload is {self.address}: {reason_of(error)}") from error
        if isinstance(system, LocalFileSystem):
            self.address = self._root  # absolute

    @property
    def _system(self) -> AbstractFileSystem:
        """The one that fsspec keeps; FTP's is connected anew, as its servers end connections that are idle."""
        return fsspec.core.url_to_fs(self._url)[0]

    def check_writable(self) -> None:
        """Raise a DataError unless a small file is written there and deleted; of folders the last alone is made."""
        target = f"{self._root}/write-test-{secrets.token_hex(4)}"

        def test() -> None:
            with client_errors():
                if "/" in self._root and not self._system.exists(self._root):  # without one it is a bucket
                    self._system.mkdir(self._root, create_parents=False)
                self._system.pipe_file(target, b"may be deleted")
                self._system.rm_file(target)

        try:
            self._persistently(test, "written")
        except NotImplementedError as error:
            raise DataError(f"upload is {self.address}: fsspec does not write there; try s3:// or the like") from error

    def refuse_files(self) -> None:
        """Raise a DataError where files of names that are going to be written are there already."""

        def names() -> list[str]:
            with client_errors():
                self._system.invalidate_cache()
                found = self._system.ls(self._root, detail=False) if self._system.exists(self._root) else []
            return sorted(path.rpartition("/")[2] for path in found)

        there = self._persistently(names, "read")
        others = [name for name in there if name in _BESIDE or name.endswith(".tar")]
        if others:
            raise DataError(
                f"upload is {self.address}, which holds {others[0]} already, and out= has no journal that names it: "
                "choose another address, give the out= that it came from, or delete it"
            )

    def _persistently(self, action: Callable[[], T], done: str) -> T:
        """As the function of that name; errors name the key."""
        try:
            return persistently(self.address, action, done)
        except DataError as error:
            raise DataError(f"upload is {error}") from error

    def send(self, file: Path) -> None:
        """Copies a file; it is whole there when this returns.

        Raises:
            OSError: it cannot be written, or has another size there.
        """
        target = f"{self._root}/{file.name}"

        def put() -> None:
            with client_errors():
                self._system.put_file(str(file), target)
                self._system.invalidate_cache()
                size = self._system.info(target)["size"]
            if size != file.stat().st_size:
                raise OSError(errno.EIO, f"{size} bytes arrived of {file.stat().st_size}")

        try:
            persistently(f"{self.address}/{file.name}", put, "written")
        except DataError as error:  # which would count as a clip's that is no good
            raise OSError(str(error)) from error

    def finish(self, folder: Path) -> None:
        """Copies what lies beside the shards, the manifest last; nothing where that is there already."""

        def same() -> bool:
            with client_errors():
                self._system.invalidate_cache()
                target = f"{self._root}/{FILE}"
                return self._system.exists(target) and self._system.cat_file(target) == (folder / FILE).read_bytes()

        if not persistently(self.address, same):
            for name in _BESIDE:
                if (folder / name).exists():
                    self.send(folder / name)
