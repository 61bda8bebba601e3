"""What every command shares: help, and a user's mistake as one line with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

from data.errors import DataError
from radial import RadialError
from train.errors import UserError


def guarded(command: Callable[[list[str]], None], arguments: list[str], usage: str) -> None:
    """Runs ``command``; prints ``usage`` for --help; turns mistakes into one line on stderr and exit code 2."""
    if any(word in ("-h", "--help") for word in arguments):
        print(usage)
        return
    try:
        command(arguments)
    except (UserError, DataError, RadialError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
