"""Shards that move to an object store as they are finished: `upload=s3://bucket/shards` of `data.prepare`.

Object stores cannot rename, which is how a shard is finished, and have no locks. So the shard in work and the journal
lie in the folder of this machine, and each finished shard is copied before its record is written and removed after it:
a kill in between leaves a copy without a record, which is made anew under the same name. The manifest goes last, and
until it is there nobody reads the shards. A store shows an object once all of it has arrived.
"""

from __future__ import annotations

import errno
from pathlib import Path

import fsspec.core

from data.errors import DataError
from data.io.faults import client_errors
from data.io.retry import persistently
from data.shards.manifest import EMPTY_PROMPT, FILE, REJECTED
from data.shards.origins import LIST

_BESIDE = (LIST, REJECTED, EMPTY_PROMPT, FILE)  # the shards; the manifest says that all is there


class Upload:
    """A folder of an object store that shards go to.

    Args:
        address: anything that fsspec writes, such as ``s3://bucket/shards``.

    Raises:
        DataError: no file system is known for the address, or its package is not installed.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise DataError(f"upload is {address}: {error}") from error

    def refuse_shards(self) -> None:
        """Raise a DataError where shards or a manifest are there already, which nothing on this machine names."""

        def names() -> list[str]:
            self._system.invalidate_cache()
            with client_errors():
                found = self._system.ls(self._root, detail=False) if self._system.exists(self._root) else []
            return sorted(path.rpartition("/")[2] for path in found)

        others = [name for name in persistently(self.address, names) if name == FILE or name.endswith(".tar")]
        if others:
            raise DataError(
                f"upload is {self.address}, which holds {others[0]} already, and out= has no journal that names it: "
                "choose another address, give the out= that it came from, or delete it"
            )

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
            self._system.invalidate_cache()
            with client_errors():
                target = f"{self._root}/{FILE}"
                return self._system.exists(target) and self._system.cat_file(target) == (folder / FILE).read_bytes()

        if not persistently(self.address, same):
            for name in _BESIDE:
                if (folder / name).exists():
                    self.send(folder / name)
