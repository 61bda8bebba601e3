"""Black bars at the edges of a video, as of a film in a frame of another shape."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.error
import numpy as np

from data.prepare.frames import decoded, opened, video_stream

_PLACES = 9  # frames that are looked at, spread over the video
_DARK = 24  # levels of 255: the brightest that a pixel of a bar may be, compression's ringing aside
_RINGING = 0.02  # the share of a bar's pixels that may be brighter
_LEAST = 0.02  # of a side: narrower bars are no bars
_EDGE = 2  # pixels by which the picture is cut narrower than it was found, as a bar's edge is blurred


class Box(NamedTuple):
    """The picture between the bars, in shares of the stored frame's height and width."""

    top: float
    bottom: float
    left: float
    right: float


WHOLE = Box(0.0, 1.0, 0.0, 1.0)


def find_bars(path: str | Path) -> Box:
    """What is left of a video without its black bars, `WHOLE` where it has none, or is black throughout.

    A row or column is a bar's where it is dark in every frame that is looked at, from the edge inwards.

    Raises:
        av.error.FFmpegError, OSError, ValueError, DataError: it cannot be read.
    """
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None
    for picture in _pictures(path):
        bright = picture > _DARK
        down, across = bright.mean(axis=1) > _RINGING, bright.mean(axis=0) > _RINGING
        if rows is not None and (rows.shape != down.shape or columns is None or columns.shape != across.shape):
            return WHOLE  # its size changes on the way
        rows, columns = (down, across) if rows is None or columns is None else (rows | down, columns | across)
    if rows is None or columns is None or not (rows.any() and columns.any()):
        return WHOLE
    return Box(*_inner(rows), *_inner(columns))


def _inner(lit: np.ndarray) -> tuple[float, float]:
    """Where the picture begins and ends along a side."""
    places, length = np.flatnonzero(lit), len(lit)
    first, last = int(places[0]), int(places[-1]) + 1
    first = first + _EDGE if first >= _LEAST * length else 0
    last = last - _EDGE if length - last >= _LEAST * length else length
    return (first / length, last / length) if first < last else (0.0, 1.0)


def _pictures(path: str | Path) -> list[np.ndarray]:
    """The brightness (H, W) of frames at key frames spread over a video, of the first ones where it has no length; of
    frames between key frames too where there are few of these, as in most clips of some seconds."""
    pictures: dict[tuple[int | None, int], np.ndarray] = {}  # by time: two places may have one key frame
    with opened(path) as container:
        stream = video_stream(container)
        stream.thread_count = 1
        seconds = container.duration / av.time_base if container.duration else 0.0
        start = container.start_time or 0
        for place in range(_PLACES):
            if seconds:
                try:
                    container.seek(start + int(place / _PLACES * seconds * av.time_base))
                except av.error.FFmpegError:
                    break
            frame: Any = next(container.decode(stream), None)
            if frame is None:
                break
            time = frame.dts if frame.pts is None else frame.pts
            pictures[time, place if time is None else 0] = frame.to_ndarray(format="gray")
    few = seconds > 0 and len(pictures) <= _PLACES // 2
    return (_between_key_frames(path, seconds) if few else []) or list(pictures.values())


def _between_key_frames(path: str | Path, seconds: float) -> list[np.ndarray]:
    """The brightness of frames spread over a video of this length, all of which is decoded, up to where it is
    damaged."""
    pictures: list[np.ndarray] = []
    first: float | None = None
    with opened(path) as container, contextlib.suppress(av.error.FFmpegError):
        stream = video_stream(container)
        stream.thread_count = 1
        for timed in decoded(container, stream):
            if timed.time is not None:
                first = timed.time if first is None else first
                if timed.time - first >= len(pictures) / _PLACES * seconds:
                    pictures.append(timed.frame.to_ndarray(format="gray"))
    return pictures
