"""Where the clips of a video lie: end to end, anew from each cut, and without those that look wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from av.video.frame import VideoFrame

from data.prepare.clip_rules import Measures, Meter, Rules, SmallPictures


@dataclass(frozen=True)
class Passed:
    """A piece of a video that is not taken.

    Attributes:
        start: where it starts, in seconds.
        why: a key of `data.prepare.clip_rules.REASONS`.
        measures: of a whole clip.
    """

    start: float
    why: str
    measures: Measures | None = field(default=None, compare=False)


class ClipPlaces:
    """Lays clips end to end over the frames of a video, and anew from each cut where they are split there.

    Args:
        fps, frames, rules: as in `data.prepare.video.read_clips`.
        origin: where the first frame lies in the file, in seconds.

    Attributes:
        index: the number of the clip in work.
        filled: its frames so far.
        measures: of the last clip that was completed, where small pictures are looked at.
    """

    def __init__(self, fps: float, frames: int, rules: Rules, origin: float) -> None:
        self._fps, self._frames, self._rules, self._origin = fps, frames, rules, origin
        self._meter = Meter()
        self.index = self.filled = 0
        self.measures: Measures | None = None
        self._at = self._shot = self._taken = 0  # output frames so far, where the shot begins, full clips of it
        self._cuts, self._broken = 0, False

    def cut(self, here: bool) -> Iterator[Passed]:
        """The next frame begins a shot, if `here`."""
        if not here:
            return
        self._cuts += 1
        if self._rules.cuts == "split":
            yield from self._short()
            self._begin()
            self._shot, self._taken = self._at, 0
        else:
            self._broken = self.filled > 0

    def add(self, look: Any) -> Passed | float | None:
        """The next output frame: the start in seconds of the clip that it completes, or that this is not taken."""
        if look is not None:
            self._meter.add(look)
        self.filled += 1
        self._at += 1
        if self.filled < self._frames:
            return None
        start = self._origin + (self._at - self._frames) / self._fps
        self.measures = self._meter.measures() if look is not None else None
        why = "cut" if self._broken else self._rules.against(self.measures) if self.measures is not None else None
        self._taken += 1
        self._begin()
        if why is not None:
            return Passed(start, why, self.measures)
        self.index += 1
        return start

    def end(self) -> Iterator[Passed]:
        """The video ends here."""
        if self._cuts and self._rules.cuts == "split":
            yield from self._short()

    def _short(self) -> Iterator[Passed]:
        if self._at > self._shot and not self._taken:
            yield Passed(self._origin + self._shot / self._fps, "short")

    def _begin(self) -> None:
        self.filled, self._broken = 0, False
        self._meter.clear()


def with_small_pictures(
    paced: Iterator[tuple[VideoFrame, int, Fraction | None]], rules: Rules, measure: bool
) -> Iterator[tuple[VideoFrame, int, Fraction | None, Any, bool]]:
    """The same frames with a small picture of each, or None where nothing needs it, and whether it begins a shot."""
    if not (rules.look or measure):
        for frame, repeats, aspect in paced:
            yield frame, repeats, aspect, None, False
        return
    small_picture = SmallPictures()
    looks = (((frame, repeats, aspect), small_picture(frame)) for frame, repeats, aspect in paced)
    if rules.cuts == "keep":
        for (frame, repeats, aspect), look in looks:
            yield frame, repeats, aspect, look, False
        return
    from data.prepare.shots import Cuts  # PySceneDetect takes a second to import

    for (frame, repeats, aspect), look, cut in Cuts(rules.cut_threshold)(looks):
        yield frame, repeats, aspect, look, cut
