"""Decoded frames as RGB pictures in the size of their bucket.

swscale computes with accurate rounding and interpolates the chroma at full resolution, which brings it within one level
of 255 of the exact result; without these two flags 1080p to 720p comes out 2 levels too dark, and greenish. Chroma lies
where the stream says, and in the middle of its luma where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from data.colour import matrix_of
from data.errors import DataError
from data.prepare.bars import WHOLE, Box

Size = tuple[int, int]
"""(height, width) in pixels."""

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_MATRICES = {0: "RGB", 1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 9: "BT.2020"}  # AVCOL_SPC_*
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


def nearest_size(height: float, width: float, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


class Scaler:
    """Frames as RGB in the size of their bucket: what is in `box` is scaled to cover it, turned upright, cropped in the
    centre."""

    def __init__(self, sizes: Sequence[Size], box: Box = WHOLE) -> None:
        self._sizes = sizes
        self._box = box
        self._reformatter = VideoReformatter()
        self._last: tuple[VideoFrame, np.ndarray] | None = None
        self._size: Size | None = None

    def __call__(self, frame: VideoFrame, aspect: Fraction | None) -> np.ndarray:
        """A frame as (H, W, 3) uint8; `aspect` is that of its pixels, None for square ones.

        Raises:
            DataError: with the reason alone, when it cannot be scaled.
        """
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        try:
            picture = self._scaled(frame, aspect)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DataError(f"a frame cannot be scaled: {reason_of(error)}") from error
        self._last = (frame, picture)
        return picture

    def _scaled(self, frame: VideoFrame, aspect: Fraction | None) -> np.ndarray:
        whole, box = shown_size(frame, aspect), self._box
        across, down, left = _orientation(frame)
        parts = (box.bottom - box.top, box.right - box.left)
        tall, wide = parts[::-1] if across else parts
        shown = (whole[0] * tall, whole[1] * wide)
        # The first frame decides, also where a stream changes its size on the way.
        self._size = size = self._size or nearest_size(*shown, self._sizes)
        scale = max(size[0] / shown[0], size[1] / shown[1])
        height, width = (max(side, round(was * scale)) for side, was in zip(size, whole, strict=True))
        if across:
            height, width = width, height
        range_ = _range(frame)
        # swscale takes the full range of 10 bits for that of 8 times 4, which ends at 1020 instead of 1023.
        deep = range_ == ColorRange.JPEG and max(c.bits for c in frame.format.components) > 8
        picture = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb48le" if deep else "rgb24",
            src_colorspace=_matrix(frame),
            src_color_range=range_,
            dst_color_range=ColorRange.JPEG,
            interpolation=_EXACT | (Interpolation.AREA if scale < 1 else Interpolation.BICUBIC),
            threads=1,
        ).to_ndarray()
        if deep:
            picture = np.rint(picture / np.float32(257)).astype(np.uint8)
        picture = _inside(picture, box, size[::-1] if across else size)
        if across:
            picture = picture.swapaxes(0, 1)
        picture = picture[:: -1 if down else 1, :: -1 if left else 1]
        top, start = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
        return picture[top : top + size[0], start : start + size[1]]


def _inside(picture: np.ndarray, box: Box, size: Size) -> np.ndarray:
    """What of a picture lies in the box, of the given size at least."""
    if box == WHOLE:
        return picture
    slices = []
    for length, first, last, least in zip(picture.shape, box[::2], box[1::2], size, strict=False):
        begin = min(round(first * length), length - least)
        slices.append(slice(begin, max(round(last * length), begin + least)))
    return picture[tuple(slices)]


def shown_size(frame: VideoFrame, aspect: Fraction | None) -> Size:
    """The size in which a player shows a frame whose pixels have an aspect ratio: upright and with square pixels."""
    width = round(frame.width * float(aspect)) if aspect else frame.width
    return (width, frame.height) if _orientation(frame)[0] else (frame.height, width)


def reason_of(error: Exception) -> str:
    """Why FFmpeg refused, without its numbers and file names."""
    if isinstance(error, DataError):
        return str(error)
    return str(getattr(error, "strerror", None) or error)


def _matrix(frame: VideoFrame) -> int:
    """The YUV matrix; a stream that does not say is taken as players do, by its size."""
    matrix = int(frame.colorspace)
    if matrix == _UNSPECIFIED:
        return matrix_of(frame.height, frame.width)
    if matrix not in _MATRICES:
        known = ", ".join(dict.fromkeys(_MATRICES.values()))
        raise DataError(f"its colour matrix has number {matrix} of ITU-T H.273, expected one of {known}")
    return matrix


def _range(frame: VideoFrame) -> ColorRange:
    """Full (0 to 255) or limited (16 to 235): as the stream says, else limited; RGB and grey are full."""
    form = frame.format
    yuv = not form.is_rgb and len(form.components) > 2
    full = frame.color_range == ColorRange.JPEG or form.name.startswith("yuvj") or not yuv
    return ColorRange.JPEG if full else ColorRange.MPEG


def _orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """What shows a frame upright, from its display matrix: swap rows and columns, then reverse the rows, the columns.

    A matrix (a, b, u, c, d, v, x, y, w) puts the pixel at column p and row q to column a p + c q and row b p + d q;
    angles between two quarter turns count as the nearer one.
    """
    found: Any = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(found, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
