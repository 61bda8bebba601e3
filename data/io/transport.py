"""A file's bytes by the scheme of its address: a path, http(s), a `pipe:` command, and what fsspec opens."""

from __future__ import annotations

import contextlib
import http
import http.client
import os
import select
import signal
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.faults import CommandError, client_errors
from data.io.retry import check_wanted

TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20
_LOOK = 0.5  # seconds between two looks at whether a silent command is still wanted
_SAID = 4096  # bytes at the end of what a command writes to stderr, of which an error quotes the last line


def scheme_of(url: str) -> str:
    """`file` for a path, else what stands before the colon: http, https, pipe, s3, …"""
    if url.startswith("pipe:"):
        return "pipe"
    head, colon, _ = url.partition("://")
    return head.lower() if colon else "file"


def stream(url: str) -> Iterator[bytes]:
    """A file's bytes from start to end.

    Raises:
        OSError, HTTPException: as the system, the server, the client or the command says; a TimeoutError after
            `TIMEOUT` seconds without a byte.
        DataError: a `pipe:` command's output is no longer wanted (`data.io.retry.give_up_on`).
    """
    scheme = scheme_of(url)
    if scheme == "pipe":
        yield from _output_of(url)
        return
    with contextlib.ExitStack() as stack:
        source: Any
        if scheme in ("http", "https"):
            source = stack.enter_context(request(url))
        elif scheme == "file":
            source = stack.enter_context(Path(url.removeprefix("file://")).open("rb"))
        else:
            stack.enter_context(client_errors())
            source = stack.enter_context(fsspec_open(url))
        while chunk := source.read(CHUNK):
            yield chunk
        if scheme in ("http", "https") and source.length:
            raise http.client.IncompleteRead(b"", source.length)  # reading in pieces does not notice it


def _output_of(url: str) -> Iterator[bytes]:
    """What the shell's command of a `pipe:` address writes to stdout."""
    began = False
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            url.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # so that all that the shell starts can be ended with it
        )
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        waiting = select.poll()  # select.select takes no more than 1,024 files
        waiting.register(pipe, select.POLLIN)
        try:
            while True:
                _wait_for(lambda: waiting.poll(_LOOK * 1000), url)
                chunk = os.read(pipe, CHUNK)
                if not chunk:
                    break
                began = True
                yield chunk
            _wait_for(lambda: _has_ended(process), url)
        finally:
            if process.returncode is None:  # not waited for, so that its number is no other's, even where it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            status = process.wait()
        if status:
            said.seek(max(0, said.seek(0, 2) - _SAID))
            lines = said.read().decode(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            raise CommandError(status, last, began)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, or does so before the next look."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LOOK)
    return process.returncode is not None


def _wait_for(look: Callable[[], object], url: str) -> None:
    """Looks, each time for up to `_LOOK` seconds, until there is something.

    Raises:
        DataError: it is no longer wanted.
        TimeoutError: there was nothing for `TIMEOUT` seconds.
    """
    end = time.monotonic() + TIMEOUT
    while not look():
        check_wanted(url)
        if time.monotonic() > end:
            raise TimeoutError(f"the command neither wrote nor ended for {TIMEOUT} s")


def request(url: str, offset: int | None = None, size: int = 0) -> Any:
    """An HTTP server's answer, asked for `size` bytes from `offset` on, or for all of them."""
    headers = {} if offset is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    plain = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # blanks and letters beyond ASCII
    return urllib.request.urlopen(urllib.request.Request(plain, headers=headers), timeout=TIMEOUT)


def knows_ranges(url: str) -> bool:
    """Whether the server gives parts of this file."""
    with request(url, 0, 1) as answer:
        return bool(answer.status == http.HTTPStatus.PARTIAL_CONTENT)


def fsspec_open(url: str) -> Any:
    """A file of fsspec's, opened for reading from any place.

    Raises:
        DataError: no file system is known for the scheme, or its package is not installed.
        Exception: whatever the file system's client raises, see `data.io.faults.client_errors`.
    """
    import fsspec.core

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {' '.join(str(error).split())}") from error
    # Samples are read whole and once: caching ahead would read what is not wanted.
    return system.open(path, "rb", cache_type="none")
