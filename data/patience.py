"""Trying again what failed on its way, as long as a network or a server usually needs to come back."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import logging
import time
import urllib.error
from collections.abc import Callable, Iterator
from typing import TypeVar

from data.errors import DataError

T = TypeVar("T")
ATTEMPTS = 8
LONGEST = 60.0  # seconds between two of them, unless a server asks for more
PATIENCE = 600.0  # seconds that a server may ask for
AGAIN = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
log = logging.getLogger(__name__)


def persistently(url: str, action: Callable[[], T]) -> T:
    """What `action` returns; it is tried again after failures of the way.

    Raises:
        DataError: it failed `ATTEMPTS` times, or in a way that time does not mend.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)
            refused = code is not None and 400 <= code < 500 and code not in AGAIN
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reason = f"HTTP {code} {reason}" if code is not None else reason
            if refused or isinstance(error, LASTING) or attempt == ATTEMPTS:
                raise DataError(f"{url}: cannot be read ({reason}); check that it can be reached") from error
            seconds = max(min(2.0 ** (attempt - 1), LONGEST), _asked_for(error))
            log.warning("%s: %s, trying again in %.0f s", url, reason, seconds)
            time.sleep(seconds)
    raise AssertionError


def _asked_for(error: Exception) -> float:
    """The seconds that a server's Retry-After asks to wait, which is a number or a date; 0 without one."""
    value = error.headers.get("Retry-After") if isinstance(error, urllib.error.HTTPError) else None
    if value is None:
        return 0.0
    try:
        seconds = float(value) if value.isdecimal() else _seconds_until(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), PATIENCE)


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
