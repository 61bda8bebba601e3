"""Bytes from wherever shards lie: local files, http(s), `pipe:` commands, and what fsspec opens (S3 and the like).

Local files, HTTP servers that know ranges and fsspec URLs are read where a sample lies; the rest of a shard is never
touched. A `pipe:` command and a server without ranges can only be read through (`data.io.whole`): the shard is fetched
whole, once for each reader, into the cache folder or a temporary one. Failures that may pass are tried again for two
minutes (`data.io.retry`), then stop the run: a sample is only ever judged by bytes that arrived.
"""

from __future__ import annotations

import http
import http.client
import urllib.error
from pathlib import Path
from typing import Any, Protocol

from data.io import whole
from data.io.faults import client_errors
from data.io.retry import persistently
from data.io.transport import CHUNK as CHUNK
from data.io.transport import fsspec_open, knows_ranges, request, scheme_of, stream


class ShardFile(Protocol):
    """An open shard.

    Attributes:
        light: it holds a descriptor that can be given back, as the file is opened again in no time.
    """

    light: bool

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `offset` on; how many, fewer than it holds only where the shard ends."""

    def close(self) -> None:
        """Give back what it holds."""


def open_shard(url: str, sha256: str, cache: Path | None) -> ShardFile:
    """Open a shard for reading.

    Args:
        url: where it lies.
        sha256: of the whole shard, which names it in the cache.
        cache: a folder that keeps whole remote shards, shared by all processes of a machine; None for no cache.

    Raises:
        DataError: it cannot be reached.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return _open_local(Path(url.removeprefix("file://")))
    if cache is not None:
        kept = whole.fetch_into(cache, url, sha256)
        return _open_local(kept) if isinstance(kept, Path) else RemoteFile(url, kept)
    if scheme == "pipe":
        return RemoteFile(url, whole.fetch(url, sha256, "commands cannot be read from the middle"))
    if scheme in ("http", "https"):
        if persistently(url, lambda: knows_ranges(url)):
            return _HttpFile(url)
        return RemoteFile(url, whole.fetch(url, sha256, "this server does not answer ranges"))
    return _FsspecFile(url)


def read_all(url: str) -> bytes:
    """A small file, whole.

    Raises:
        DataError: it cannot be reached.
    """
    return persistently(url, lambda: b"".join(stream(url)))


class RemoteFile:
    """An open file that can be read from the middle.

    Attributes:
        url: as it is named in errors.
        light: as of `ShardFile`.
    """

    def __init__(self, url: str, file: Any, light: bool = False) -> None:
        self.url, self._file, self.light = url, file, light

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return persistently(self.url, lambda: self.fill(offset, buffer))

    def fill(self, offset: int, buffer: memoryview) -> int:
        """Read into a buffer from this byte on; returns how many bytes came, less than asked at the end alone."""
        self._file.seek(offset)
        return _fill(self._file, buffer)

    def close(self) -> None:
        self._file.close()


class _FsspecFile(RemoteFile):
    """A file of fsspec's: S3 and the like."""

    def __init__(self, url: str) -> None:
        def opened() -> Any:
            with client_errors():
                return fsspec_open(url)

        super().__init__(url, persistently(url, opened))

    def fill(self, offset: int, buffer: memoryview) -> int:
        with client_errors():
            return super().fill(offset, buffer)


class _HttpFile:
    """A file on a server that knows ranges."""

    light = False  # it holds no descriptor

    def __init__(self, url: str) -> None:
        self._url = url

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return persistently(self._url, lambda: self.fill(offset, buffer))

    def fill(self, offset: int, buffer: memoryview) -> int:
        try:
            with request(self._url, offset, len(buffer)) as answer:
                place = answer.headers.get("Content-Range", "none")
                if answer.status != http.HTTPStatus.PARTIAL_CONTENT or not place.startswith(f"bytes {offset}-"):
                    found = f"HTTP {answer.status} with Content-Range {place}"
                    raise OSError(f"asked for bytes from {offset} on, the server answered {found}")
                filled = _fill(answer, buffer)
                if answer.length:
                    raise http.client.IncompleteRead(b"", answer.length)
                return filled
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return 0  # the shard ends before
            raise

    def close(self) -> None:
        pass


def _fill(file: Any, buffer: memoryview) -> int:
    """Read into all of `buffer`; one call may give fewer bytes than it is asked for."""
    filled = 0
    while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
        filled += count
    return filled


def _open_local(path: Path) -> ShardFile:
    return RemoteFile(str(path), persistently(str(path), lambda: path.open("rb", buffering=0)), light=True)
