"""Trying again what failed on its way, as long as a network or a server usually needs to come back."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import itertools
import logging
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from data.errors import DataError

T = TypeVar("T")
PATIENCE = 120.0  # seconds that are waited in all, whatever a server asks for
AGAIN = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
log = logging.getLogger(__name__)
_unwanted: ContextVar[threading.Event] = ContextVar("unwanted", default=threading.Event())  # noqa: B039  never set


def give_up_on(unwanted: threading.Event) -> None:
    """From now on this thread gives up what it tries, waits for or downloads once the event is set."""
    _unwanted.set(unwanted)


def check_wanted(url: str, seconds: float = 0.0) -> None:
    """Wait, for so many seconds, unless what this thread does is no longer wanted: raise a DataError then."""
    if _unwanted.get().wait(seconds):
        raise DataError(f"{url}: is no longer wanted")


def persistently(url: str, action: Callable[[], T]) -> T:
    """What `action` returns; it is tried again after failures of the way, after 1 s, 2 s, 4 s and so on.

    Raises:
        DataError: it failed and `PATIENCE` seconds were waited, or it failed in a way that time does not mend, or it is
            no longer wanted (`give_up_on`).
    """
    left = PATIENCE
    for attempt in itertools.count():
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)
            refused = code is not None and 400 <= code < 500 and code not in AGAIN
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reason = f"HTTP {code} {reason}" if code is not None else reason
            if refused or isinstance(error, LASTING) or left <= 0:
                raise DataError(f"{url}: cannot be read ({reason}); check that it can be reached") from error
            seconds = min(max(2.0**attempt, _asked_for(error)), left)
            left -= seconds
            log.warning("%s: %s, trying again in %.0f s", url, reason, seconds)
            check_wanted(url, seconds)
    raise AssertionError


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


@contextlib.contextmanager
def as_os_errors(*but: type[Exception]) -> Iterator[None]:
    """What fsspec's file systems raise of their own, errors of their HTTP clients for example, as OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OSError, DataError, *but)):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error
