"""Bytes from wherever shards lie: local files, http(s), `pipe:` commands, and what fsspec opens (S3 and the like).

Local files, HTTP servers that know ranges and fsspec URLs are read where a sample lies; the rest of a shard is never
touched. A `pipe:` command and a server without ranges can only be read through: the shard is fetched whole, once for
each reader, into the cache folder or a temporary one. Failures of the way are tried again for two minutes, then stop
the run: a sample is only ever judged by bytes that arrived, and a whole shard that is not what its manifest says only
where it arrives so twice; the cache keeps none of those.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import logging
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from data.errors import DataError
from data.files import commit, temporary
from data.patience import as_os_errors, check_wanted, persistently

TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 8  # times that a whole shard is fetched which arrives differently each time
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
        return _open_local(Path(url.removeprefix("file://")))
    if cache is not None:
        return _cached(url, sha256, cache)
    if scheme == "pipe":
        return _fetched(url, sha256, "commands cannot be read from the middle")
    if scheme in ("http", "https"):
        if _knows_ranges(url):
            return _HttpFile(url)
        return _fetched(url, sha256, "this server does not answer ranges")
    return _FsspecFile(url, persistently(url, lambda: _fsspec_open(url)))


def read_all(url: str) -> bytes:
    """A small file, whole.

    Raises:
        DataError: it cannot be reached.
    """
    return persistently(url, lambda: b"".join(_stream(url)))


class _File:
    """An open file that can be read from the middle."""

    def __init__(self, url: str, file: Any) -> None:
        self._url = url
        self._file = file

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


class _FsspecFile(_File):
    def _fill(self, offset: int, buffer: memoryview) -> int:
        with as_os_errors():
            return super()._fill(offset, buffer)


def _fill(file: Any, buffer: memoryview) -> int:
    """Read into all of `buffer`; one call may give fewer bytes than it is asked for."""
    filled = 0
    while filled < len(buffer) and (count := file.readinto(buffer[filled:])):
        filled += count
    return filled


def _open_local(path: Path) -> ShardFile:
    return _File(str(path), persistently(str(path), lambda: path.open("rb", buffering=0)))


def _fetched(url: str, sha256: str, why: str) -> ShardFile:
    """A shard that can only be read through, in a temporary file of this reader."""
    log.warning("%s: is read through for each reader (%s); a cache folder reads it once", url, why)
    folder = Path(tempfile.gettempdir())
    with _written_to(folder):
        file = tempfile.TemporaryFile(prefix="shard-")  # noqa: SIM115  without a name: a kill leaves nothing behind
    try:
        _download_surely(url, sha256, file, folder)
    except BaseException:
        with contextlib.suppress(OSError):  # it writes what is left, which fails on a full disk as it failed before
            file.close()
        raise
    return _File(url, file)


def _cached(url: str, sha256: str, cache: Path) -> ShardFile:
    """The shard in the cache, fetched when it is not there yet; one process fetches, the others wait.

    One that is not what its manifest says is read all the same, but not kept.
    """
    path = cache / f"{sha256}.tar"
    if path.exists():
        return _open_local(path)
    with _written_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{sha256}.lock").open("w", encoding="utf-8")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return _open_local(path)
        partial = temporary(path)
        with _written_to(cache):
            file = partial.open("w+b")
        try:
            if not _download_surely(url, sha256, file, cache):
                return _File(url, file)  # the open file keeps the bytes
            with _written_to(cache):
                commit(file, path)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise
        finally:
            partial.unlink(missing_ok=True)
    return _open_local(path)


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """What fails in here is this folder's fault, a full disk for example, and no failure of the way."""
    try:
        yield
    except OSError as error:
        hint = "make room there, or choose another with data.cache="
        raise DataError(
            f"{folder}: a shard cannot be kept in this folder ({error.strerror or error}); {hint}"
        ) from error


def _download_surely(url: str, sha256: str, file: BinaryIO, folder: Path) -> bool:
    """Fetch a whole shard into an empty file in `folder`; returns whether it is what its manifest says.

    Raises:
        DataError: it cannot be reached, or is not what its manifest says and never arrives the same twice in a row; or
            the folder cannot hold it.
    """
    before = None
    for _ in range(ATTEMPTS):
        found = persistently(url, lambda: _download(url, file, folder))
        if found == sha256:
            return True
        log.warning("%s: is not what its manifest says (SHA-256 %s, not %s)", url, found, sha256)
        if found == before:
            return False
        before = found
    raise DataError(f"{url}: arrived {ATTEMPTS} times and was another each time; check the way to it")


def _download(url: str, file: BinaryIO, folder: Path) -> str:
    """Fetch a whole file in place of what `file`, which lies in `folder`, holds; returns its SHA-256."""
    digest = hashlib.sha256()
    with _written_to(folder):
        file.seek(0)
        file.truncate()
    for chunk in _stream(url):
        check_wanted(url)
        digest.update(chunk)
        with _written_to(folder):
            file.write(chunk)
    with _written_to(folder):
        file.flush()
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
