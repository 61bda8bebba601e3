"""Bytes from wherever shards lie: local files, http(s), `pipe:` commands, and what fsspec opens (S3 and the like).

Local files, HTTP servers that know ranges and fsspec URLs are read where a sample lies; the rest of a shard is never
touched. A `pipe:` command and a server without ranges can only be read through: the shard is fetched whole, once for
each reader, into the cache folder or a temporary one. Failures of the way are tried again for two minutes, then stop
the run: a sample is only ever judged by bytes that arrived, and a whole shard that is not what its manifest says only
where it arrives so twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data.errors import DataError
from data.patience import ATTEMPTS, as_os_errors, persistently

TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20
log = logging.getLogger(__name__)


class ShardFile(Protocol):
    """An open shard."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `offset` on; how many, fewer than it holds only where the shard ends."""

    def close(self) -> None:
        """Give back what it holds."""


def scheme_of(url: str) -> str:
    """`file` for a path, else what stands before the colon: http, https, pipe, s3, …"""
    if url.startswith("pipe:"):
        return "pipe"
    head, colon, _ = url.partition("://")
    return head.lower() if colon else "file"


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
        return _LocalFile(Path(url.removeprefix("file://")))
    if cache is not None:
        return _LocalFile(_cached(url, sha256, cache))
    if scheme == "pipe":
        return _Fetched(url, sha256, "commands cannot be read from the middle")
    if scheme in ("http", "https"):
        if _knows_ranges(url):
            return _HttpFile(url)
        return _Fetched(url, sha256, "this server does not answer ranges")
    return _FsspecFile(url)


def read_all(url: str) -> bytes:
    """A small file, whole.

    Raises:
        DataError: it cannot be reached.
    """
    return persistently(url, lambda: b"".join(_stream(url)))


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self._url = str(path)
        self._file: BinaryIO = persistently(self._url, lambda: path.open("rb", buffering=0))

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return persistently(self._url, lambda: self._fill(offset, buffer))

    def _fill(self, offset: int, buffer: memoryview) -> int:
        self._file.seek(offset)
        return _fill(self._file, buffer)

    def close(self) -> None:
        self._file.close()


class _HttpFile:
    def __init__(self, url: str) -> None:
        self._url = url

    def read_into(self, offset: int, buffer: memoryview) -> int:
        return persistently(self._url, lambda: self._fill(offset, buffer))

    def _fill(self, offset: int, buffer: memoryview) -> int:
        try:
            with _request(self._url, offset, len(buffer)) as answer:
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


class _FsspecFile(_LocalFile):
    def __init__(self, url: str) -> None:
        self._url = url
        self._file = persistently(url, lambda: _fsspec_open(url))

    def _fill(self, offset: int, buffer: memoryview) -> int:
        with as_os_errors():
            return super()._fill(offset, buffer)


class _Fetched(_LocalFile):
    """A shard that can only be read through, in a temporary file of this reader."""

    def __init__(self, url: str, sha256: str, why: str) -> None:
        log.warning("%s: is read through for each reader (%s); a cache folder reads it once", url, why)
        handle, name = tempfile.mkstemp(prefix="shard-", suffix=".tar")
        os.close(handle)
        path = Path(name)
        try:
            _download_surely(url, sha256, path)
            super().__init__(path)
        finally:
            path.unlink()  # the open file keeps the bytes, and nothing stays behind when the process is killed


def _fill(file: Any, buffer: memoryview) -> int:
    """Read into all of `buffer`; one call may give fewer bytes than it is asked for."""
    filled = 0
    while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
        filled += count
    return filled


def _cached(url: str, sha256: str, cache: Path) -> Path:
    """The shard in the cache, fetched when it is not there yet; one process fetches, the others wait."""
    path = cache / f"{sha256}.tar"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f".{sha256}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = cache / f".{sha256}.tmp"
            _download_surely(url, sha256, partial)
            partial.replace(path)
    return path


def _download_surely(url: str, sha256: str, path: Path) -> None:
    """Fetch a whole shard; one that is not what its manifest says is kept only where it arrives so twice in a row."""
    before = None
    for _ in range(ATTEMPTS):
        found = persistently(url, lambda: _download(url, path))
        if found == sha256:
            return
        log.warning("%s: is not what its manifest says (SHA-256 %s, not %s)", url, found, sha256)
        if found == before:
            return
        before = found
    raise DataError(f"{url}: arrived {ATTEMPTS} times and was another each time; check the way to it")


def _download(url: str, path: Path) -> str:
    """Fetch a whole file; returns its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _stream(url):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _stream(url: str) -> Iterator[bytes]:
    """A file's bytes from start to end."""
    scheme = scheme_of(url)
    with contextlib.ExitStack() as stack:
        source: Any
        if scheme == "pipe":
            from webdataset.gopen import gopen

            source = gopen(url)
            stack.callback(source.proc.wait)
            stack.callback(source.stream.close)
        elif scheme in ("http", "https"):
            source = stack.enter_context(_request(url))
        elif scheme == "file":
            source = stack.enter_context(Path(url.removeprefix("file://")).open("rb"))
        else:
            stack.enter_context(as_os_errors())
            source = stack.enter_context(_fsspec_open(url))
        try:
            while chunk := source.read(CHUNK):
                yield chunk
            if scheme == "pipe":
                source.wait_for_child()  # raises when the command failed
            if scheme in ("http", "https") and source.length:
                raise http.client.IncompleteRead(b"", source.length)  # reading in pieces does not tell
        except OSError as error:
            if scheme == "pipe" and source.status:
                # A shell's 127: there is no such command, and time does not bring one.
                kind = FileNotFoundError if source.status == 127 else OSError
                raise kind(f"the command exited with {source.status}") from error
            raise


def _request(url: str, offset: int | None = None, size: int = 0) -> Any:
    headers = {} if offset is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _knows_ranges(url: str) -> bool:
    def first_byte() -> bool:
        with _request(url, 0, 1) as answer:
            return bool(answer.status == http.HTTPStatus.PARTIAL_CONTENT)

    return persistently(url, first_byte)


def _fsspec_open(url: str) -> Any:
    import fsspec

    try:
        # Samples are read whole and once: caching ahead would read what is not wanted.
        with as_os_errors(ImportError, ValueError):
            return fsspec.open(url, "rb", cache_type="none").open()
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {' '.join(str(error).split())}") from error
