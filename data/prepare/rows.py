"""The chosen videos one by one, and a million of them in little memory: as text, each an object while it is used."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO, overload

_READ = 1 << 20  # characters of a file that are read at once
_BLOCK = 1 << 20  # bytes of texts in one buffer: one that grows to all of them is copied, and leaves holes in memory


@dataclass(frozen=True)
class Row:
    """A chosen video, or a piece of one.

    Attributes:
        path: as listed.
        caption: its caption.
        clips: how many clips its header promises; 0 where it may be a little too short, which decoding decides.
        start, end: the piece in seconds; None is the video's end.
        piece: what distinguishes it from other pieces of the same video, as in `data.prepare.listed.name_of`.
        look: its fingerprint, where duplicates are left out.
    """

    path: str
    caption: str
    clips: int
    start: float = 0.0
    end: float | None = None
    piece: str | None = None
    look: Sequence[int] | None = None

    @property
    def name(self) -> str:
        """What it is called in messages and lists."""
        return self.piece or self.path


class Texts:
    """A list of texts, in buffers of UTF-8; half a character, as names of other codings have, stays what it is.

    Args:
        count: of the texts that it begins with, all empty.
    """

    def __init__(self, count: int = 0) -> None:
        self._blocks = [bytearray()]
        # of each text its block, where it starts in it, and how long it is
        self._homes, self._starts, self._lengths = (array("I", bytes(4 * count)) for _ in range(3))

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, number: int) -> str:
        start = self._starts[number]
        return self._blocks[self._homes[number]][start : start + self._lengths[number]].decode(errors="surrogatepass")

    def __setitem__(self, number: int, text: str) -> None:
        content = text.encode(errors="surrogatepass")
        if len(self._blocks[-1]) + len(content) > _BLOCK:
            self._blocks.append(bytearray())
        self._homes[number], self._starts[number] = len(self._blocks) - 1, len(self._blocks[-1])
        self._lengths[number] = len(content)
        self._blocks[-1] += content

    def append(self, text: str) -> None:
        """Add a text behind the last."""
        for numbers in (self._homes, self._starts, self._lengths):
            numbers.append(0)
        self[-1] = text


class Rows(Sequence[Row]):
    """Rows in little memory: captions, and what else there is of a row as JSON.

    Args:
        rows: that it begins with.
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._captions, self._others = Texts(), Texts()
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Add a row behind the last."""
        self._captions.append(row.caption)
        self._others.append(json.dumps([value for name, value in vars(row).items() if name != "caption"]))

    def caption_all(self, captions: Texts) -> None:
        """Give every row the caption of its number, instead of its own."""
        assert len(captions) == len(self)
        self._captions = captions

    def __len__(self) -> int:
        return len(self._others)

    @overload
    def __getitem__(self, number: int) -> Row: ...

    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...

    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        path, *others = json.loads(self._others[number])
        return Row(path, self._captions[number], *others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and len(self) == len(other) and all(map(Row.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # rows may be added

    def to_json(self) -> Iterator[str]:
        """The rows as a JSON array, in parts."""
        for number, row in enumerate(self):
            yield f"{', ' if number else '['}{json.dumps(vars(row))}"
        yield "]" if len(self) else "[]"

    @classmethod
    def read(cls, text: str, file: TextIO) -> tuple[Rows, str]:
        """Rows from a JSON array whose beginning, behind the bracket, is `text`, and `file` goes on with it.

        Returns:
            The rows, and all that stands behind the array.

        Raises:
            json.JSONDecodeError: it is none.
        """
        rows, at, decode = cls(), 0, json.JSONDecoder().raw_decode
        while text[at : at + 1] != "]":
            if text[at : at + 1] in (",", " "):
                at += 1
                continue
            try:
                found, at = decode(text, at)
            except json.JSONDecodeError:
                more = file.read(_READ)  # the text ends within a row
                if not more:
                    raise
                text, at = text[at:] + more, 0
                continue
            rows.append(Row(**found))
        return rows, text[at + 1 :] + file.read()
