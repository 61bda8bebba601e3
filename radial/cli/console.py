"""Standard output that may go away: work goes on when a terminal closes or the disk behind ``> file`` is full."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any, TextIO, cast


class _Dropping(io.FileIO):
    """A file whose writes never fail: what it does not take (EIO, ENOSPC, EPIPE, EAGAIN) is dropped."""

    def write(self, data: Any) -> int:
        """Writes what can be written; returns how much was, or all of it where the rest is dropped."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def drop_what_cannot_be_written() -> None:
    """Makes `sys.stdout` and `sys.stderr` streams to which every write succeeds, for the rest of this process.

    What the file behind them does not take is dropped, and characters that its encoding lacks are written as ``\\u…``.
    Streams that something else has put there, such as a test's, stay as they are.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _dropping(getattr(sys, name)))


def _dropping(stream: TextIO | None) -> TextIO:
    if stream is None:  # the process was started with this file closed
        return Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")
    given = cast(io.TextIOWrapper, stream)
    with contextlib.suppress(OSError):
        given.flush()
    raw = _Dropping(given.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        cast(io.BufferedWriter, raw) if given.write_through else io.BufferedWriter(raw),  # unbuffered is `python -u`
        encoding=given.encoding,
        errors="backslashreplace",
        line_buffering=given.line_buffering,
        write_through=given.write_through,
    )
