"""Lines of text that people write: prompts, captions, tables. Only a line feed ends a line.

Python's `splitlines` also ends one at U+2028, U+2029, U+0085, the vertical tab and the form feed, which are characters
like others inside a caption.
"""

from __future__ import annotations

from pathlib import Path

from data.errors import DataError


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, without the mark that Windows' editors put in front.

    Raises:
        DataError: it is in another coding; the message starts with the path.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        marked = (
            " but UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f" ({error.reason}, byte {error.start})"
        )
        raise DataError(f"{path}: is not in UTF-8{marked}; save it as UTF-8") from error
    if "\0" in text:
        # UTF-16 without a mark is valid UTF-8 as long as it is English.
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}: line {line} holds a zero byte, as UTF-16 does; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their line feeds and the carriage returns before these."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
