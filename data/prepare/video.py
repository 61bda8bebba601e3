"""From a video file to clips of frames at the model's pace and size.

Decoded with PyAV, which is faster on a core than TorchCodec (figures in data/README.md).

Time is read from the frames' timestamps, so a variable rate needs nothing special: output frame k shows what a player
shows k / fps seconds after the first frame. Nothing here needs torch, so that decoding processes start fast.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av.error
import numpy as np
from av.video.frame import VideoFrame

from data.errors import DataError
from data.prepare.bars import WHOLE, find_bars
from data.prepare.clip_places import ClipPlaces, Passed, with_small_pictures
from data.prepare.clip_rules import ALL, Measures, Rules
from data.prepare.frames import between, opened, stream_seconds, video_stream
from data.prepare.scaling import Scaler, Size, reason_of, shown_size

DECODING = 4
"""Counts up when the same video gives other frames: part of what a folder of shards is continued by."""

_TICK = 0.002  # seconds by which a timestamp may be off: Matroska counts milliseconds
_JUMP = 5.0  # seconds from one frame to the next above which the clock is broken, or ten times the usual
_REORDER = 16  # frames that a codec may show in another order than it stores them, and so times that may be mixed up
_SLACK = 0.5  # seconds by which a stream may end before its header says
_SHORT = 1.0  # seconds by which it may go on after that: MPEG program streams are a group of pictures longer


@dataclass(frozen=True)
class VideoInfo:
    """What a file is, as a player shows it.

    Attributes:
        height, width: pixels, after rotation and with square pixels.
        fps: average rate of the source; None where it is unknown.
        seconds: length as the header says; None where it does not.
    """

    height: int
    width: int
    fps: float | None
    seconds: float | None

    def frames_at(self, fps: float) -> int | None:
        """How many frames there are at a pace; None where the length is unknown."""
        return None if self.seconds is None else math.floor((self.seconds + _TICK) * fps)

    def within(self, start: float, end: float | None) -> VideoInfo:
        """The same of a piece, in seconds."""
        last = end if self.seconds is None else self.seconds if end is None else min(end, self.seconds)
        return replace(self, seconds=None if last is None else max(0.0, last - start))

    def may_hold(self, frames: int, fps: float) -> bool:
        """Whether so many frames at a pace may be there: a header can be short by a second or a quarter of the clip."""
        return self.seconds is None or self.seconds + min(_SHORT, frames / fps / 4) + _TICK >= frames / fps


@dataclass(frozen=True)
class Clip:
    """One clip: its number within the video, where it starts in seconds, frames (F, H, W, 3) uint8 RGB, and its
    measures where they are asked for."""

    index: int
    start: float
    frames: np.ndarray
    measures: Measures | None = None


def probe(path: str | Path) -> VideoInfo:
    """Read the header and decode the first frame.

    Raises:
        DataError: with the reason alone, when the file is no video that can be used.
    """
    try:
        with opened(path) as container:
            stream = video_stream(container)
            first = next(container.decode(stream), None)
            if first is None:
                raise DataError("no frame can be decoded")
            height, width = shown_size(first, stream.sample_aspect_ratio)
            rate = stream.average_rate
            return VideoInfo(height, width, float(rate) if rate else None, stream_seconds(stream, container))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(reason_of(error)) from error


def decoded_seconds(path: str | Path) -> float:
    """How long the picture of a video is, to a thousandth: all of it is decoded, as a header may tell of its sound.

    Raises:
        DataError: as `read_clips`.
    """
    return sum(repeats for _, repeats, _ in _paced(path, 1000, 0.0, None)) / 1000


def read_clips(
    path: str | Path,
    *,
    fps: float,
    frames: int,
    sizes: Sequence[Size],
    most: int | None = None,
    skip: Collection[int] = (),
    rules: Rules = ALL,
    start: float = 0.0,
    end: float | None = None,
    measure: bool = False,
) -> Iterator[Clip | Passed]:
    """The clips of a video, one after the other without a gap but where `rules` leave one, in the memory of one clip.

    Args:
        fps: pace of the output.
        frames: length of a clip; what is left at the end of the video is dropped.
        sizes: buckets; the one of the nearest aspect ratio is covered and cropped in its centre.
        most: at most this many clips.
        skip: numbers of clips that are passed over: decoded, as what follows needs it, but not scaled.
        rules: which clips are taken; clips are numbered without the others.
        start, end: the piece of the video that is meant, in seconds after its first frame; None is its end.
        measure: measure all clips, whatever the rules need.

    Raises:
        DataError: with the reason alone, after the clips before the damage: the file cannot be decoded, its clock
            jumps, or it ends before its header says.
    """
    places = ClipPlaces(fps, frames, rules, start)
    buffer: np.ndarray | None = None
    try:
        box = WHOLE if rules.bars == "keep" else find_bars(path)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(reason_of(error)) from error
    if box != WHOLE and rules.bars == "drop":
        yield Passed(start, "bars")
        return
    scaler = Scaler(sizes, box)
    for frame, repeats, aspect, look, cut in with_small_pictures(_paced(path, fps, start, end), rules, measure):
        yield from places.cut(cut)
        for _ in range(repeats):
            if places.index not in skip:
                picture = scaler(frame, aspect)
                if buffer is None:
                    buffer = np.empty((frames, *picture.shape), np.uint8)
                buffer[places.filled] = picture
            found = places.add(look)
            if isinstance(found, Passed):
                yield found
            elif found is not None:
                if buffer is not None:
                    yield Clip(places.index - 1, found, buffer, places.measures)
                buffer = None
                if places.index == most:
                    return
    yield from places.end()


def _paced(
    path: str | Path, fps: float, begin: float, until: float | None
) -> Iterator[tuple[VideoFrame, int, Fraction | None]]:
    """Each decoded frame with how many output frames show it, those whose time lies before the next frame's, and the
    aspect ratio of its pixels."""
    shown: VideoFrame | None = None
    failure: str | None = None
    origin: float | None = None
    last, held, end, done = 0.0, 0.0, 0.0, 0
    behind, fall, before, ahead = 0, 0.0, shown, 0.0
    try:
        with opened(path) as container:
            stream = video_stream(container)
            stream.thread_count = 1  # many processes decode at once
            usual = 1 / float(stream.average_rate or fps)
            step, longest = usual, max(_JUMP, 10 * usual)
            frames = between(container, stream, begin, until)
            while True:
                try:
                    timed = next(frames, None)
                except av.error.FFmpegError as error:
                    timed, failure = None, reason_of(error)
                if timed is not None and timed.damaged:
                    if shown is None:
                        continue  # the stream starts between two key frames
                    timed, failure = None, f"damaged frame at {begin + end:.2f} s"
                if timed is None:
                    break
                if origin is None and timed.time is not None:
                    origin = timed.time - end
                time = end if timed.time is None or origin is None else timed.time - origin
                if shown is not None:
                    # Frames come in the right order: a time that goes back is wrong, or a second recording begins.
                    if time < last - _TICK:
                        behind += 1
                        if behind == 1:
                            fall, before, ahead = time - last, shown, last + step
                        elif last - time > _REORDER * usual:
                            failure, shown, end = _jump(ahead - step, fall), before, ahead
                            break
                        time = last + min(held, longest)
                    else:
                        behind = 0
                    if time - last > longest:  # a player would show one picture for all that time
                        failure, end = _jump(last, time - last), last + step  # as long as the frame before it
                        break
                    step = max(time - last, 0.0) or step
                    repeats = max(0, math.ceil((time - _TICK) * fps) - done)
                    yield shown, repeats, stream.sample_aspect_ratio
                    done += repeats
                shown, last, held = timed.frame, time, timed.seconds or usual
                end = max(end, time + held)
            if held > longest:
                failure, end = failure or _jump(last, held), last + step
            if shown is not None:
                yield shown, max(0, math.floor((end + _TICK) * fps) - done), stream.sample_aspect_ratio
            # A file's length may be that of its sound.
            expected = stream_seconds(stream, container if len(container.streams) == 1 else None)
            if expected is not None:
                expected = (expected if until is None else min(expected, until)) - begin
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(reason_of(error)) from error
    if failure is None and shown is None:
        failure = "no frame can be decoded"
    if failure is None and expected is not None and end < expected - max(_SLACK, 3 * usual):
        failure = f"truncated: ends after {begin + end:.2f} s, its header says {begin + expected:.2f} s"
    if failure is not None:
        raise DataError(failure)


def _jump(place: float, step: float) -> str:
    return f"time jumps by {step:.2f} s at {place:.2f} s"
