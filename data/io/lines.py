"""Lines of text that people write: prompts, captions, tables. Only a line feed ends a line.

Python's `splitlines` also ends one at U+2028, U+2029, U+0085, the vertical tab and the form feed, which are characters
like others inside a caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.errors import DataError


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that Windows' editors put in front.

    Raises:
        DataError: it is in another coding; the message starts with the path.
        OSError: it cannot be read.
    """
    return "".join(utf8_lines(path))


def utf8_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, read as they are asked for, each with its line feed; without the mark in front.

    Raises:
        DataError: it is in another coding; the message starts with the path.
        OSError: it cannot be read.
    """
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                first = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
                found = " but UTF-16" if first else f" ({error.reason}, byte {start + error.start})"
                raise DataError(f"{path}: is not in UTF-8{found}; save it as UTF-8") from error
            if "\0" in text:
                # UTF-16 without a mark is valid UTF-8 as long as it is English.
                raise DataError(f"{path}: line {number} holds a zero byte, as UTF-16 does; save it as UTF-8")
            yield text
            start += len(line)


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their line feeds and the carriage returns before these."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
