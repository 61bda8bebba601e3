"""What every command shares: help, and a user's mistake as one line with exit code 2."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import DataError
from data.io.console import drop_what_cannot_be_written
from radial import RadialError
from train.errors import UserError
from train.ranks import speaks_for_node

MISTAKES = (UserError, DataError, RadialError)
"""What a user can mend; the message says how."""


def guarded(command: Callable[[list[str]], None], arguments: list[str], usage: str) -> None:
    """Runs ``command``; prints ``usage`` for --help; turns mistakes into one line on stderr and exit code 2,
    Ctrl-C into one and exit code 130. Output that nobody takes any more ends nothing (`data.io.console`)."""
    drop_what_cannot_be_written()
    if any(word in ("-h", "--help") for word in arguments):
        print(usage)
        return
    try:
        command(arguments)
    except MISTAKES as error:
        if not speaks_for_node():
            time.sleep(5)  # where the first fails alike, it prints the reason, and srun or torchrun ends this process
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # before a run listens for it, or of a command that has nothing to save
        print("\ninterrupted", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def number(key: str, text: str) -> float:
    """A finite number.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{key} is {text!r}, expected a number such as 0.8")
    return value


def whole_number(key: str, text: str, least: int = 1) -> int:
    """A whole number.

    Raises:
        UserError: it is none, or less than ``least``.
    """
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{key} is {text!r}, expected a whole number of at least {least}")
    return int(text)


def flag(key: str, text: str) -> bool:
    """true or false.

    Raises:
        UserError: something else.
    """
    if text not in ("true", "false"):
        raise UserError(f"{key} is {text!r}, expected true or false")
    return text == "true"


def json_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of ``--json FILE``, if it is given, and the other words.

    Raises:
        UserError: there is no word after it.
    """
    if "--json" not in arguments:
        return None, arguments
    at = arguments.index("--json")
    if at + 1 == len(arguments):
        raise UserError("--json needs a file name")
    return Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]


def split_files(text: str) -> list[str]:
    """``a.safetensors,b.safetensors:0.8`` at its commas, but those in the name of a file or folder that is there."""
    words = text.split(",")
    found = []
    while words:
        joined = [",".join(words[:count]) for count in range(len(words), 1, -1)]
        word = next((word for word in joined if _is_there(word)), words[0])
        found.append(word)
        del words[: word.count(",") + 1]
    return found


def _is_there(word: str) -> bool:
    path, _, strength = word.rpartition(":")
    return Path(word).expanduser().exists() or ("," not in strength and path != "" and Path(path).expanduser().exists())


def files_with_strengths(key: str, text: str) -> list[tuple[Path, float]]:
    """``a.safetensors:0.8,b.safetensors`` as files and strengths; a strength that is left out is 1.

    Raises:
        UserError: a strength that is no number, or no file's name.
    """
    found = []
    for word in split_files(text):
        if not word:
            raise UserError(f"{key} is {text!r}, expected FILE or FILE:STRENGTH, with a comma between two")
        path, colon, strength = word.rpartition(":")
        if not colon or Path(word).expanduser().exists():
            path, strength = word, "1"
        found.append((Path(path).expanduser(), number(key, strength)))
    return found
