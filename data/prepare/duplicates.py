"""Videos that are there twice: the same file, or the same pictures encoded again.

Of a few places of each video, a picture of 9 x 8 pixels gives 64 bits: whether each pixel is brighter than its left
neighbour. Scaling, compression and small changes of brightness or colour leave nearly all of them as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import av.error
import numpy as np
from av.video.reformatter import Interpolation

from data.errors import DataError
from data.prepare.frames import between, opened, stream_seconds, video_stream

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where a video is looked at, in shares of its length."""

_BITS = 5.0  # of 64 that may differ on average between two that are the same
_LENGTHS = 250  # milliseconds by which their lengths may differ
_BAND = 16  # bits of a place; two videos are compared where all of one such band agree

Fingerprint = Sequence[int]
"""64 bits for each of `PLACES`, then the length in milliseconds."""


def fingerprint_of(path: Path, start: float, end: float | None) -> Fingerprint | None:
    """The fingerprint of a video from `start` to `end` in seconds, None for its end.

    Returns:
        None where the video cannot be looked at, or is flat.
    """
    found = []
    try:
        with opened(path) as container:
            seconds = stream_seconds(video_stream(container), container)
        until = seconds if end is None else end if seconds is None else min(end, seconds)
        if until is None:
            return None
        for place in PLACES:
            with opened(path) as container:
                stream = video_stream(container)
                stream.thread_count = 1
                frame = next(between(container, stream, start + place * (until - start), None)).frame
                small = frame.reformat(width=9, height=8, format="gray", interpolation=Interpolation.AREA).to_ndarray()
            bits = small[:, 1:].astype(np.int16) > small[:, :-1]
            found.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
    except (av.error.FFmpegError, OSError, ValueError, StopIteration, DataError):
        return None  # decoding it for its clips says what is wrong
    return [*found, round(1000 * (until - start))] if any(found) else None


class Duplicates:
    """The videos so far, and whether a further one is among them."""

    def __init__(self) -> None:
        self._known: list[tuple[str, Fingerprint]] = []
        self._bands: dict[tuple[int, int, int], list[int]] = defaultdict(list)

    def twin(self, name: str, look: Fingerprint) -> str | None:
        """The name of an earlier video that is the same; None where there is none, and this one is added."""
        bands = [
            (place, shift, bits >> shift & ((1 << _BAND) - 1))
            for place, bits in enumerate(look[:-1])
            for shift in range(0, 64, _BAND)
        ]
        for number in sorted({number for band in bands for number in self._bands.get(band, ())}):
            other, known = self._known[number]
            apart = [(a ^ b).bit_count() for a, b in zip(look[:-1], known[:-1], strict=True)]
            if sum(apart) <= _BITS * len(apart) and abs(look[-1] - known[-1]) <= _LENGTHS:
                return other
        for band in bands:
            self._bands[band].append(len(self._known))
        self._known.append((name, look))
        return None
