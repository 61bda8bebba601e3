"""Trying again what failed on its way, as long as a network or a server usually needs to come back."""

from __future__ import annotations

import email.utils
import http.client
import itertools
import logging
import resource
import threading
import time
import urllib.error
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from data.errors import DataError
from data.io.faults import is_lasting, is_nobody, is_too_many_files, reason_of

T = TypeVar("T")
PATIENCE = 120.0  # seconds that are waited in all, whatever a server asks for
log = logging.getLogger(__name__)
_unwanted: ContextVar[threading.Event] = ContextVar("unwanted", default=threading.Event())  # noqa: B039  never set
answered: set[str] = set()  # places that have given something to this process


def give_up_on(unwanted: threading.Event) -> None:
    """From now on this thread gives up what it tries, waits for or downloads once the event is set."""
    _unwanted.set(unwanted)


def check_wanted(url: str, seconds: float = 0.0) -> None:
    """Wait, for so many seconds, unless what this thread does is no longer wanted: raise a DataError then."""
    if _unwanted.get().wait(seconds):
        raise DataError(f"{url}: is no longer wanted")


def persistently(url: str, action: Callable[[], T], done: str = "read") -> T:
    """What `action` returns; it is tried again after failures that may pass, after 1 s, 2 s, 4 s and so on.

    A refused connection or an unknown host fails at once if nothing was ever read from that host in this process;
    later its server may be starting anew, and it is tried again. Errors that are neither the system's nor HTTP's are
    raised as they are.

    Args:
        url: of what is read or written.
        done: what is done with it, in words.

    Raises:
        DataError: it failed and `PATIENCE` seconds were waited, or it failed in a way that time does not mend, or it is
            no longer wanted (`give_up_on`).
    """
    left, before, place = PATIENCE, None, _place_of(url)
    for attempt in itertools.count():
        try:
            found = action()
        except (OSError, http.client.HTTPException) as error:
            if is_too_many_files(error):
                raise DataError(f"{url}: {too_many_files()}") from error
            nobody = place not in answered and is_nobody(error, before)
            if nobody or left <= 0 or is_lasting(error):
                hint = "check that it can be reached"
                raise DataError(f"{url}: cannot be {done} ({reason_of(error)}); {hint}") from error
            seconds = min(max(2.0**attempt, _asked_for(error)), left)
            left, before = left - seconds, error
            log.warning("%s: %s, trying again in %.0f s", url, reason_of(error), seconds)
            check_wanted(url, seconds)
        else:
            answered.add(place)
            return found
    raise AssertionError


def too_many_files() -> str:
    """What to say and to do where no more files can be opened."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"this process may have {most} files open and has them all: raise ulimit -n, or give a cache folder, whose "
        "shards are closed and opened again as needed"
    )


def _place_of(url: str) -> str:
    """Scheme and host of a URL, a `pipe:` command's first word; the folder of a path."""
    if url.startswith("pipe:"):
        return url.split(maxsplit=1)[0]
    scheme, found, rest = url.partition("://")
    return scheme + rest.partition("/")[0] if found else url.rpartition("/")[0]


def _asked_for(error: Exception) -> float:
    """The seconds that a server's Retry-After asks to wait, which is a number or a date; 0 without one."""
    value = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    if value is None:
        return 0.0
    try:
        return float(value) if value.isdecimal() else _seconds_until(value)
    except ValueError:
        return 0.0


def _seconds_until(date: str) -> float:
    return email.utils.parsedate_to_datetime(date).timestamp() - time.time()
