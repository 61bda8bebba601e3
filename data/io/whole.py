"""Whole shards, fetched: into a cache folder that the processes of a machine share, or into a temporary file.

A `pipe:` command and a server without ranges can only be read through. A whole shard that is not what its manifest says
is taken as that only where it arrives so twice; the cache keeps none of those.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError
from data.io.faults import is_too_many_files
from data.io.files import commit, temporary
from data.io.locks import Lock, say_no_locks, take
from data.io.retry import check_wanted, persistently, too_many_files
from data.io.transport import stream

ATTEMPTS = 8  # times that a whole shard is fetched which arrives differently each time
log = logging.getLogger(__name__)


def fetch(url: str, sha256: str, why: str) -> BinaryIO:
    """A shard that can only be read through, in a temporary file of this reader.

    Args:
        url: where it lies.
        sha256: of the whole shard.
        why: it can only be read through, in words.

    Raises:
        DataError: see `_download_surely`.
    """
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
    return file


def fetch_into(cache: Path, url: str, sha256: str) -> Path | BinaryIO:
    """A shard's path in the cache, where it is fetched to unless it is there; one process fetches, the others wait.

    One that is not what its manifest says is read all the same, but not kept: its open file comes back. Where the
    file system has no locks, each process that wants it fetches it.

    Raises:
        DataError: see `_download_surely`.
    """
    path = cache / f"{sha256}.tar"
    if path.exists():
        return path
    with _written_to(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{sha256}.lock").open("w", encoding="utf-8")
    with lock:
        with _written_to(cache):
            alone = take(lock, wait=True) is Lock.OURS
        if not alone:
            say_no_locks(cache, "that another process fetches the same shard")
        if path.exists():
            return path
        partial = temporary(path if alone else path.with_name(f"{path.name}.{secrets.token_hex(4)}"))
        with _written_to(cache):
            file = partial.open("w+b")
        try:
            if not _download_surely(url, sha256, file, cache):
                return file  # which keeps the bytes
            with _written_to(cache):
                commit(file, path)
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise
        finally:
            partial.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _written_to(folder: Path) -> Iterator[None]:
    """What fails in here is this folder's fault, a full disk for example, and no failure of the way."""
    try:
        yield
    except OSError as error:
        if is_too_many_files(error):
            raise DataError(too_many_files()) from error
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
    for chunk in stream(url):
        check_wanted(url)
        digest.update(chunk)
        with _written_to(folder):
            file.write(chunk)
    with _written_to(folder):
        file.flush()
    return digest.hexdigest()
