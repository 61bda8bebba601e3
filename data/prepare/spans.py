"""Pieces of long videos: from when to when, as tables of them write it.

A time is a number of seconds, or a text such as `12.5`, `1:02.5` and `0:01:02.500`; in columns that have the word frame
in their names, such as `start_frame`, it is the number of a frame. A cell may hold several pieces, as a list or as the
text of one, with a list of captions beside it.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError

STARTS = ("start", "start_time", "start_sec", "start_seconds", "start_frame", "frame_start", "begin")
ENDS = ("end", "end_time", "end_sec", "end_seconds", "end_frame", "frame_end")
BOTH = ("timestamp", "timestamps", "segment", "segments", "span", "time_range", "frame_range")
"""The usual names of the columns of starts, of ends, and of both."""

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_FRAMES = frozenset(f"{place}frame{end}" for place in ("", "start", "end") for end in ("", "s", "stamp", "stamps"))


@dataclass(frozen=True, slots=True)  # there may be a million
class Span:
    """A piece of a video from `start` to `end`, None for the video's end; in seconds, or in frames of the file."""

    start: float
    end: float | None
    frames: bool = False

    def seconds(self, fps: float | None) -> tuple[float, float | None]:
        """Start and end in seconds, of a file of `fps` frames a second.

        Raises:
            DataError: it is counted in frames, and the file has no rate.
        """
        if not self.frames:
            return self.start, self.end
        if not fps:
            raise DataError("start and end are frames, but its header has no frame rate; give seconds")
        return self.start / fps, None if self.end is None else self.end / fps


def spans_of(row: Mapping[str, Any], start: str | None, end: str | None) -> list[Span]:
    """The pieces that a row names in its columns `start` and `end`, which may be one; none where both are empty.

    Raises:
        DataError: with the reason alone: a cell is no time, or an end lies before its start.
    """
    if start is not None and start == end:
        pairs = _listed(row.get(start))
        if pairs is None:
            return []
        if pairs and not isinstance(pairs[0], list | tuple):
            pairs = [pairs]
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise DataError(f"{start} is {row.get(start)!r}, expected [start, end] or a list of such pairs")
        starts, ends = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        first, last = (_listed(row.get(name)) if name else None for name in (start, end))
        if first is None and last is None:
            return []
        starts = first if first is not None else [0] * len(last or [])
        ends = last if last is not None else [None] * len(starts)
        if len(starts) != len(ends):
            raise DataError(f"{start} holds {len(starts)} times and {end} {len(ends)}, expected as many")
    frames = _counts_frames(start or end or "")
    return [_span(one, other, frames) for one, other in zip(starts, ends, strict=True)]


def _counts_frames(column: str) -> bool:
    """Whether a column holds numbers of frames, by a word of its name: `start_frame`, `endFrame`, `framestamp`."""
    return not _FRAMES.isdisjoint(word.lower() for word in _WORD.findall(column))


def _span(start: Any, end: Any, frames: bool) -> Span:
    begin, until = seconds_of(start), None if _empty(end) else seconds_of(end)
    if begin < 0 or (until is not None and until <= begin):
        raise DataError(f"a piece from {start} to {end}, expected an end after its start")
    return Span(begin, until, frames)


def seconds_of(time: Any) -> float:
    """A time in seconds, from a number or from `12.5`, `1:02.5` or `0:01:02.500`.

    Raises:
        DataError: it is no time.
    """
    try:
        if isinstance(time, bool):
            raise ValueError
        if isinstance(time, str) and ":" in time:
            parts = time.strip().replace(",", ".").split(":")
            if len(parts) > 3 or not all(part.isdecimal() for part in parts[:-1]):
                raise ValueError
            value = sum(float(part) * 60**power for power, part in enumerate(reversed(parts)))
        else:
            value = float(time)
        if not math.isfinite(value):
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(f"{time!r} is no time, expected seconds, MM:SS or HH:MM:SS.mmm") from None
    return round(value, 6)


def texts_of(cell: Any, count: int) -> list[Any]:
    """The captions of `count` pieces: of a list as long one each, of any other cell the same for all.

    Raises:
        DataError: with the reason alone: a list of another length.
    """
    listed = cell if isinstance(cell, list | tuple) else _literal(cell)
    if not isinstance(listed, list | tuple):
        return [cell] * count
    if len(listed) != count:
        raise DataError(f"{len(listed)} captions for {count} pieces, expected one each")
    return list(listed)


def _listed(cell: Any) -> list[Any] | None:
    """The times of a cell, None where it is empty."""
    if _empty(cell):
        return None
    found = _literal(cell) if isinstance(cell, str) else cell
    return list(found) if isinstance(found, list | tuple) else [cell]


def _literal(cell: Any) -> Any:
    """What the text of a list holds; any other cell as it is."""
    if isinstance(cell, str) and cell.strip().startswith(("[", "(")):
        try:
            return ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError):
            return cell
    return cell


def _empty(cell: Any) -> bool:
    return cell is None or cell != cell or (isinstance(cell, str) and not cell.strip())


def usual(columns: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns of starts and ends by their usual names, the same one twice where it holds both; None for none."""
    both = next((name for name in BOTH if name in columns), None)
    start, end = (next((name for name in names if name in columns), None) for names in (STARTS, ENDS))
    return (start, end) if start or end else (both, both)
