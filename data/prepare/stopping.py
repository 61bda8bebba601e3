"""Ctrl-C, SIGTERM and SIGHUP at any moment, but never in the middle of a write: what is whole is kept."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopping:
    """While it is entered, SIGINT raises KeyboardInterrupt and SIGTERM SystemExit, inside `held` only at its end.

    SIGHUP, which comes when the terminal closes, does as SIGTERM, but under nohup and its like, which ignore it.
    Outside the main thread, where Python gives no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self._holding = False
        self._waiting: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._stop) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is done here is done whole; a signal that comes meanwhile stops the process afterwards."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            number, self._waiting = self._waiting, None
            if number is not None:
                self._stop(number, None)

    def _stop(self, number: int, frame: Any) -> None:
        if self._holding:
            self._waiting = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
