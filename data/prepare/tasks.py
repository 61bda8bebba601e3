"""The videos that a rank decodes."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence

from data.prepare.chosen import ChosenVideos
from data.prepare.decoders import Task


class Tasks(Sequence[Task]):
    """Some of the chosen videos to decode, each made when it is asked for: there may be a million.

    Args:
        chosen: all of them.
        rows: the numbers of those that are meant.
        present: the numbers of clips that are there already, by row.

    Attributes:
        rows: as above.
    """

    def __init__(self, chosen: ChosenVideos, rows: Iterable[int], present: Mapping[int, Collection[int]]) -> None:
        self._chosen, self._present = chosen, present
        self.rows: Sequence[int] = array("q", rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Task:  # type: ignore[override]  # no slices
        row = self.rows[position]
        video = self._chosen.rows[row]
        return Task(row, self._chosen.path(row), self._present.get(row, ()), video.start, video.end)

    def expected(self, row: int) -> int:
        """How many clips of a video are promised and not there."""
        return max(0, self._chosen.rows[row].clips - len(self._present.get(row, ())))
