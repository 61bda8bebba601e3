"""A list of videos, and what is held of each of its lines."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

from data.errors import DataError
from data.prepare.rows import Texts
from data.prepare.spans import Span

_MORE = "\0"  # before a text that is more than a path


class NoVideosError(DataError):
    """A list that can be read, and has no video in it that is asked for."""


class Candidate(NamedTuple):
    """What is held of a line of the list: not its caption and its cells.

    Attributes:
        path: as listed; empty where there is none.
        problem: why it cannot be used, where it cannot.
        span: the piece of it that is meant; None is all of it.
        place: the number of its place in the list.
    """

    path: str
    problem: str | None
    span: Span | None
    place: int


class CandidateList(Sequence[Candidate]):
    """A million candidates in little memory: as text and numbers, each an object while it is used.

    Args:
        texts, places: of candidates that it begins without, shared with another list; none where it is a list anew.
        numbers: which of them are in it.
    """

    def __init__(
        self, texts: Texts | None = None, places: array[int] | None = None, numbers: Iterable[int] = ()
    ) -> None:
        self._texts = Texts() if texts is None else texts
        self._places = array("q") if places is None else places
        self._numbers = array("q", numbers)

    def append(self, candidate: Candidate) -> None:
        """Add a candidate behind the last."""
        path, problem, span, place = candidate
        self._numbers.append(len(self._places))
        self._places.append(place)
        if problem is None and span is None and not path.startswith(_MORE):
            self._texts.append(path)  # as nearly all are: JSON takes a while for a million
        else:
            piece = None if span is None else (span.start, span.end, span.frames)
            self._texts.append(_MORE + json.dumps((path, problem, piece)))

    def picked(self, numbers: Iterable[int]) -> CandidateList:
        """Those of these numbers, in this order; their text is not copied."""
        return CandidateList(self._texts, self._places, map(self._numbers.__getitem__, numbers))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Candidate: ...

    @overload
    def __getitem__(self, number: slice) -> list[Candidate]: ...

    def __getitem__(self, number: int | slice) -> Candidate | list[Candidate]:
        if isinstance(number, slice):
            return [self[n] for n in range(len(self))[number]]
        own = self._numbers[number]
        text, place = self._texts[own], self._places[own]
        if not text.startswith(_MORE):
            return Candidate(text, None, None, place)
        path, problem, piece = json.loads(text[1:])
        return Candidate(path, problem, None if piece is None else Span(*piece), place)


class Video(NamedTuple):
    """A line of the list.

    Attributes:
        path, problem, span, place: as of a `Candidate`.
        caption: None where there is no text.
        columns: the cells of its row, by column.
        uncaptioned: all that it lacks is a caption.
    """

    path: str
    caption: str | None
    columns: Mapping[str, Any]
    problem: str | None = None
    span: Span | None = None
    place: int = 0
    uncaptioned: bool = False


def name_of(video: Candidate | Video) -> str:
    """What a listed video is called: its path, and which piece of it is meant."""
    if video.span is None:
        return video.path
    end = "" if video.span.end is None else f"{video.span.end:g}"
    return f"{video.path}[{video.span.start:g}-{end}{' frames' if video.span.frames else ''}]"


Read = Callable[[Container[int] | None, Collection[str] | None], Iterator[Video]]


@dataclass(frozen=True)
class Listed:
    """A list of videos.

    Attributes:
        source: the folder or the table.
        columns: the names of its columns.
        told: what is to be said of what it leaves aside.
        read: reads the videos at some places (None: all), with the cells of some columns at least (None: all).
    """

    source: Path
    columns: list[str]
    told: list[str]
    read: Read

    def videos(self, columns: Collection[str] | None = None) -> Iterator[Video]:
        """All videos in the list's order; a table is read while they are asked for.

        Args:
            columns: the cells that are needed; None is all.

        Raises:
            DataError: a line is none of the table; it names file and line.
        """
        return self.read(None, columns)

    def captions(self, chosen: Sequence[Candidate]) -> Texts:
        """The captions of some of its videos, which are read anew; empty where there is no text.

        Args:
            chosen: of different names.

        Raises:
            DataError: the list is not what it was.
        """
        found, missing = Texts(len(chosen)), _Missing(chosen)
        for video in self.read(missing, ()):
            number = missing.take(video)
            if number is not None:
                found[number] = video.caption or ""
        if missing.first() is not None:
            raise DataError(f"{self.source}: was changed while it was read ({missing.first()}); start again")
        return found


class _Missing(Container[int]):
    """The places of chosen videos that are still to be read: four bytes for each, as there may be a million."""

    def __init__(self, chosen: Sequence[Candidate]) -> None:
        self._chosen = chosen
        places = array("q", (video.place for video in chosen))
        self._whole = array("i", [-1]) * (1 + max(places, default=0))
        self._pieces: dict[str, int] = {}  # several of a place
        self._places = bytearray(len(self._whole))
        for number, video in enumerate(chosen):
            self._places[video.place] = True
            if video.span is None:
                self._whole[video.place] = number
            else:
                self._pieces[name_of(video)] = number

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and place < len(self._places) and bool(self._places[place])

    def take(self, video: Video) -> int | None:
        """The number of a video that was read; None where it is none of these, or has been read."""
        if video.span is not None:
            number = self._pieces.get(name_of(video), -1)
            if number < 0 or self._chosen[number].place != video.place:
                return None
            return self._pieces.pop(name_of(video))
        number = self._whole[video.place]
        if number < 0 or self._chosen[number].path != video.path:
            return None
        self._whole[video.place] = -1
        return number

    def first(self) -> str | None:
        """The name of one that was not read; None where all were."""
        left = next((number for number in self._whole if number >= 0), None)
        return name_of(self._chosen[left]) if left is not None else next(iter(self._pieces), None)
