"""From a video file to clips of frames at the model's pace and size.

Decoded with PyAV: on one core, 1080p h264 at 30 fps to 720p RGB at 16 fps runs at 55 frames/s with PyAV 18.1 and at 15
with TorchCodec 0.12 (27 without its resizing), both on the same FFmpeg libraries.

Time is read from the frames' timestamps, so a variable rate needs nothing special: output frame k shows what a player
shows k / fps seconds after the first frame. Nothing here needs torch, so that decoding processes start fast.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from data.errors import DataError

Size = tuple[int, int]
"""(height, width) in pixels."""

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_BT709, _BT601 = 1, 5  # of swscale
_HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
_TICK = 0.002  # seconds by which a timestamp may be off: Matroska counts milliseconds
_JUMP = 5.0  # seconds from one frame to the next above which the clock is broken, or ten times the usual
_SLACK = 0.5  # seconds by which a stream may end before its header says


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


@dataclass(frozen=True)
class Clip:
    """One clip: its number within the video, where it starts in seconds, and frames (F, H, W, 3) uint8 RGB."""

    index: int
    start: float
    frames: np.ndarray


def probe(path: str | Path) -> VideoInfo:
    """Read the header and decode the first frame.

    Raises:
        DataError: with the reason alone, when the file is no video that can be used.
    """
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            first = next(container.decode(stream), None)
            if first is None:
                raise DataError("no frame can be decoded")
            height, width = _shown_size(first, stream)
            rate = stream.average_rate
            return VideoInfo(height, width, float(rate) if rate else None, _seconds(stream, container))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(_reason(error)) from error


def nearest_size(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))


def read_clips(
    path: str | Path,
    *,
    fps: float,
    frames: int,
    sizes: Sequence[Size],
    most: int | None = None,
    skip: Collection[int] = (),
) -> Iterator[Clip]:
    """The clips of a video, one after the other without a gap, in constant memory: one clip.

    Args:
        fps: pace of the output.
        frames: length of a clip; what is left at the end of the video is dropped.
        sizes: buckets; the one of the nearest aspect ratio is covered and cropped in its centre.
        most: at most this many clips.
        skip: numbers of clips that are passed over: decoded, as what follows needs it, but not scaled.

    Raises:
        DataError: with the reason alone, after the clips before the damage: the file cannot be decoded, its clock
            jumps, or it ends before its header says.
    """
    buffer: np.ndarray | None = None
    filled = index = 0
    scaler = _Scaler(sizes)
    for frame, repeats, stream in _paced(path, fps):
        for _ in range(repeats):
            if index not in skip:
                picture = scaler(frame, stream)
                if buffer is None:
                    buffer = np.empty((frames, *picture.shape), np.uint8)
                buffer[filled] = picture
            filled += 1
            if filled == frames:
                if buffer is not None:
                    yield Clip(index, index * frames / fps, buffer)
                buffer, filled, index = None, 0, index + 1
                if index == most:
                    return


def _paced(path: str | Path, fps: float) -> Iterator[tuple[VideoFrame, int, Any]]:
    """Each decoded frame with how many output frames show it: those whose time lies before the next frame's."""
    shown: VideoFrame | None = None
    failure: str | None = None
    origin, last, held, end, done = 0.0, 0.0, 0.0, 0.0, 0
    try:
        with av.open(str(path)) as container:
            stream = _stream(container)
            stream.thread_count = 1  # many processes decode at once
            usual = 1 / float(stream.average_rate or fps)
            step, longest = usual, max(_JUMP, 10 * usual)
            frames = container.decode(stream)
            while True:
                try:
                    frame = next(frames, None)
                except av.error.FFmpegError as error:
                    frame, failure = None, _reason(error)
                if frame is not None and frame.is_corrupt:
                    if shown is None:
                        continue  # the stream starts between two key frames
                    frame, failure = None, f"damaged frame at {end:.2f} s"
                if frame is None:
                    break
                if shown is None:
                    origin = frame.time or 0.0
                time = end if frame.time is None else frame.time - origin
                if shown is not None:
                    # A player would show one picture for all that time, or go back.
                    if not -_TICK < time - last <= longest:
                        failure = _jump(last, time - last)
                        end = last + step  # as long as the frame before it
                        break
                    step = time - last
                    repeats = max(0, math.ceil((time - _TICK) * fps) - done)
                    yield shown, repeats, stream
                    done += repeats
                shown, last, held = frame, time, float(frame.duration * frame.time_base) or usual
                end = max(end, time + held)
            if held > longest:
                failure, end = failure or _jump(last, held), last + step
            if shown is not None:
                yield shown, max(0, math.floor((end + _TICK) * fps) - done), stream
            # A file's length may be that of its sound.
            expected = _seconds(stream, container if len(container.streams) == 1 else None)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(_reason(error)) from error
    if failure is None and shown is None:
        failure = "no frame can be decoded"
    if failure is None and expected is not None and end < expected - max(_SLACK, 3 * usual):
        failure = f"truncated: ends after {end:.2f} s, its header says {expected:.2f} s"
    if failure is not None:
        raise DataError(failure)


def _jump(place: float, step: float) -> str:
    return f"time jumps by {step:.2f} s at {place:.2f} s"


class _Scaler:
    """Frames as RGB in the size of their bucket: scaled to cover it, turned upright, cropped in the centre."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self._sizes = sizes
        self._reformatter = VideoReformatter()
        self._last: tuple[VideoFrame, np.ndarray] | None = None
        self._size: Size | None = None

    def __call__(self, frame: VideoFrame, stream: Any) -> np.ndarray:
        if self._last is not None and self._last[0] is frame:
            return self._last[1]
        try:
            picture = self._scaled(frame, stream)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise DataError(f"a frame cannot be scaled: {_reason(error)}") from error
        self._last = (frame, picture)
        return picture

    def _scaled(self, frame: VideoFrame, stream: Any) -> np.ndarray:
        shown = _shown_size(frame, stream)
        # The first frame decides, also where a stream changes its size on the way.
        self._size = size = self._size or nearest_size(*shown, self._sizes)
        scale = max(size[0] / shown[0], size[1] / shown[1])
        height, width = (max(side, round(was * scale)) for side, was in zip(size, shown, strict=True))
        turns = _quarter_turns(frame)
        if turns % 2:
            height, width = width, height
        picture = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=_matrix(frame),
            src_color_range=_range(frame),
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA if scale < 1 else Interpolation.BICUBIC,
            threads=1,
        ).to_ndarray()
        picture = np.rot90(picture, turns)
        top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
        return picture[top : top + size[0], left : left + size[1]]


def _matrix(frame: VideoFrame) -> int:
    """The YUV matrix; a stream that does not say is taken as players do, by its size."""
    if frame.colorspace != _UNSPECIFIED:
        return int(frame.colorspace)
    return _BT709 if frame.height >= 720 else _BT601


def _range(frame: VideoFrame) -> ColorRange:
    """Full (0 to 255) or limited (16 to 235): as the stream says, and limited where it does not."""
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG


def _quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns counterclockwise that show the frame upright, from the display matrix."""
    return round((frame.rotation or 0) / 90) % 4


def _shown_size(frame: VideoFrame, stream: Any) -> Size:
    aspect = stream.sample_aspect_ratio
    width = round(frame.width * float(aspect)) if aspect else frame.width
    return (width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, width)


def _stream(container: Any) -> Any:
    """The first video stream that is no cover picture."""
    streams = [s for s in container.streams.video if "ATTACHED_PIC" not in str(s.disposition).upper()]
    if not streams:
        raise DataError("no video stream")
    stream = streams[0]
    if stream.codec_context is None:
        raise DataError("its header is damaged, or its codec is unknown to this build of FFmpeg")
    transfer = stream.codec_context.color_trc
    if transfer in _HDR:
        raise DataError(f"HDR video ({_HDR[transfer]}), expected standard range; tone-map it first")
    return stream


def _seconds(stream: Any, container: Any = None) -> float | None:
    """The length of the video stream itself; where it has none of its own, as in FLV, that of `container`, if given."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    start = float(stream.start_time * stream.time_base) if stream.start_time else 0.0
    with contextlib.suppress(KeyError, ValueError):
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")  # Matroska and WebM: 00:00:05.040000000
        end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        # FFmpeg writes when the stream ends; mkvmerge, which names its tags, how long it is.
        return end if "_STATISTICS_TAGS" in stream.metadata else end - start
    if container is None or container.duration is None:
        return None
    # Matroska counts from zero, also where no stream starts there.
    return container.duration / av.time_base - (start if "matroska" in container.format.name else 0.0)


def _reason(error: Exception) -> str:
    """Why FFmpeg refused, without its numbers and file names."""
    if isinstance(error, DataError):
        return str(error)
    return str(getattr(error, "strerror", None) or error)
