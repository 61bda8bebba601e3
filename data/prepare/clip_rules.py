"""What a clip has to look like to be taken, judged on small pictures of its frames while the video is decoded.

Every decoded frame is also scaled to `SIDE` pixels. Cuts are found in these (`data.prepare.shots`), and a clip is
measured by them: how much it moves, how much of it is black, how much of it repeats the frame before. The whole of a
video is looked at, whatever clips of it are on disk, so that a run that goes on numbers the clips as the first one did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from data.errors import DataError
from data.prepare.scaling import reason_of

SIDE = 160
"""The longer side of a small picture, in pixels, at most."""

CUTS, BARS = ("split", "drop", "keep"), ("keep", "crop", "drop")

REASONS = {
    "short": "shots between cuts are shorter than a clip",
    "cut": "clips have a cut in them",
    "black": "clips are black",
    "static": "clips do not move",
    "repeated": "clips repeat their frames",
    "bars": "videos have black bars",
}
"""Why something of a video that can be decoded is not taken, and how it is counted."""

_BLACK = 12.0  # levels of 255: a frame of a lower mean is black, as in PySceneDetect's ThresholdDetector
_SAME = 0.5  # levels of 255: two frames that differ by less on average are the same picture, encoded twice


@dataclass(frozen=True)
class Measures:
    """A clip in three numbers.

    Attributes:
        motion: by how many levels of 255 a pixel of the small pictures changes from frame to frame, on average.
        black: the share of frames that are black.
        repeated: the share of frames that show the picture before once more.
    """

    motion: float
    black: float
    repeated: float


@dataclass(frozen=True)
class Rules:
    """Which clips are taken.

    Attributes:
        cuts: `split` begins a new clip at each cut, `drop` leaves out the clips with a cut in them, `keep` looks for
            none.
        cut_threshold: as in `data.prepare.shots.Cuts`.
        min_motion, max_black, max_repeated: bounds on `Measures`; None is no bound.
        bars: black bars at the edges of a video are kept, cropped, or the video is left out.
    """

    cuts: str = "keep"
    cut_threshold: float = 15.0
    min_motion: float | None = None
    max_black: float | None = None
    max_repeated: float | None = None
    bars: str = "keep"

    @property
    def look(self) -> bool:
        """Whether small pictures are needed."""
        bounds = (self.min_motion, self.max_black, self.max_repeated)
        return self.cuts != "keep" or any(bound is not None for bound in bounds)

    def against(self, found: Measures) -> str | None:
        """Why a clip is not taken, a key of `REASONS`; None where it is."""
        if self.max_black is not None and found.black > self.max_black:
            return "black"
        if self.min_motion is not None and found.motion < self.min_motion:
            return "static"
        if self.max_repeated is not None and found.repeated > self.max_repeated:
            return "repeated"
        return None


ALL = Rules()
"""Takes every clip."""


class SmallPictures:
    """Small pictures of a video's decoded frames, all of the size that the first one gets."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """A frame as (H, W, 3) uint8 in the order blue, green, red, as it is stored: not turned upright."""
        if self._size is None:
            scale = min(1.0, SIDE / max(frame.width, frame.height))
            self._size = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
        width, height = self._size
        try:
            return self._reformatter.reformat(
                frame,
                width=width,
                height=height,
                format="bgr24",
                dst_color_range=ColorRange.JPEG,
                interpolation=Interpolation.AREA,
                threads=1,
            ).to_ndarray()
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DataError(f"a frame cannot be scaled: {reason_of(error)}") from error


class Meter:
    """Measures one clip after the other, frame by frame."""

    def __init__(self) -> None:
        self._last: Any = None
        self.clear()

    def clear(self) -> None:
        """Begin a clip."""
        self._last, self._frames, self._black, self._repeated, self._changes = None, 0, 0, 0, 0.0

    def add(self, look: np.ndarray) -> None:
        """The clip's next frame, as `SmallPictures` makes it."""
        self._frames += 1
        self._black += float(look.mean()) < _BLACK
        if look is self._last:
            self._repeated += 1
        elif self._last is not None:
            change = float(np.abs(look.astype(np.int16) - self._last).mean())
            self._changes += change
            self._repeated += change < _SAME
        self._last = look

    def measures(self) -> Measures:
        """The measures of the clip so far, of two frames at least."""
        steps = max(1, self._frames - 1)
        return Measures(self._changes / steps, self._black / max(1, self._frames), self._repeated / steps)
