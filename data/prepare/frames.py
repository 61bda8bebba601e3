"""The frames of a video file in the order in which they are shown, with their times, free of interlacing."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
from av.filter import Graph
from av.stream import Disposition
from av.video.frame import VideoFrame

from data.errors import DataError
from data.prepare.packed import packed, unpacked

_TICK = 0.002  # seconds by which a timestamp may be off: Matroska counts milliseconds
_GENPTS = 0x1  # AVFMT_FLAG_GENPTS
_HDR = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic


@dataclass(frozen=True)
class Timed:
    """A decoded frame.

    Attributes:
        frame: progressive; an interlaced one has been deinterlaced.
        time: seconds on the file's clock; None where the file does not say.
        seconds: for which it is shown; 0 where the file does not say.
        damaged: FFmpeg found it damaged.
    """

    frame: VideoFrame
    time: float | None
    seconds: float
    damaged: bool


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """A file's container, with the times that it holds: PyAV asks FFmpeg to make up missing ones, which are wrong where
    frames are stored in another order than shown.

    Raises:
        av.error.FFmpegError, OSError, ValueError: it cannot be read.
    """
    inside = packed(Path(path))
    with av.open(unpacked(*inside) if inside else str(path)) as container:
        container.flags &= ~_GENPTS
        yield container


def video_stream(container: Any) -> Any:
    """The video stream that players choose: the first one marked as default, else the first; no cover picture.

    Raises:
        DataError: with the reason alone: there is none, or none that can be used.
    """
    streams = [s for s in container.streams.video if Disposition.attached_pic not in s.disposition]
    if not streams:
        raise DataError("no video stream")
    stream = next((s for s in streams if Disposition.default in s.disposition), streams[0])
    if stream.codec_context is None:
        raise DataError("its header is damaged, or its codec is unknown to this build of FFmpeg")
    transfer = stream.codec_context.color_trc
    if transfer in _HDR:
        raise DataError(f"HDR video ({_HDR[transfer]}), expected standard range; tone-map it first")
    return stream


def stream_seconds(stream: Any, container: Any = None) -> float | None:
    """The length of the video stream itself; where it has none of its own, as in FLV, that of `container`, if given."""
    files = stream.container.format.name == "asf"  # FFmpeg gives each stream of a WMV the length of the file
    if stream.duration is not None and stream.time_base is not None and not files:
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


def decoded(container: Any, stream: Any) -> Iterator[Timed]:
    """The frames of a stream; from the first interlaced one on they pass a deinterlacer.

    Raises:
        av.error.FFmpegError: from `next`, where decoding cannot go on.
    """
    clock, deinterlacer = Clock(), None
    for frame in container.decode(stream):
        seconds = float(frame.duration * frame.time_base) if frame.time_base else 0.0
        timed = Timed(frame, clock(frame), seconds, frame.is_corrupt)
        if deinterlacer is None and not frame.interlaced_frame:
            yield timed
            continue
        if deinterlacer is None or not deinterlacer.fits(frame):
            if deinterlacer is not None:
                yield from deinterlacer.rest()
            deinterlacer = Deinterlacer(frame)
        yield from deinterlacer(timed)
    if deinterlacer is not None:
        yield from deinterlacer.rest()


def between(container: Any, stream: Any, start: float, end: float | None) -> Iterator[Timed]:
    """The frames of a stream that are shown from `start` to `end`, in seconds after its first frame, with times from 0.

    It decodes from the key frame before `start` where that can be found, and from the beginning otherwise.

    Raises:
        av.error.FFmpegError: as `decoded`.
        DataError: with the reason alone: the file does not say when its frames are shown.
    """
    if start == 0 and end is None:
        yield from decoded(container, stream)
        return
    origin, usual = _seek(container, stream, start), 1 / float(stream.average_rate) if stream.average_rate else 0.0
    last: Timed | None = None  # held back until it is known how long it is shown
    after: float | None = None  # where it ends
    failure: Exception | None = None
    try:
        for timed in decoded(container, stream):
            origin = timed.time if origin is None else origin
            if timed.time is not None and origin is not None:
                time = timed.time - origin - start
            elif after is not None:  # as the last frames of an AVI
                time = after
            else:
                raise DataError("its frames have no times, so that start and end cannot be found")
            if end is not None and time >= end - start - _TICK:
                if last is not None and last.time is not None:
                    # it is shown until this one comes, whatever the file says
                    last = Timed(last.frame, last.time, end - start - last.time, last.damaged)
                break
            if last is not None and (last.time or time >= _TICK):  # of those before the start the last is shown there
                yield _until(last, start, end)
            after = time + (timed.seconds or usual)
            early = time < _TICK
            shown = max(0.0, after) if early else timed.seconds
            last = Timed(timed.frame, 0.0 if early else time, shown, timed.damaged)
    except av.error.FFmpegError as error:
        failure = error
    if last is not None and (last.time or last.seconds > _TICK):
        yield _until(last, start, end)
    if failure is not None:
        raise failure


def _until(timed: Timed, start: float, end: float | None) -> Timed:
    """A frame that is not shown after the end."""
    if end is None or timed.time is None:
        return timed
    return Timed(timed.frame, timed.time, min(timed.seconds, end - start - timed.time), timed.damaged)


def _seek(container: Any, stream: Any, start: float) -> float | None:
    """Go to the key frame before `start`, or to the beginning; the first frame's time, None where that comes next."""
    if stream.start_time is None or stream.time_base is None:
        return None
    origin = float(stream.start_time * stream.time_base)
    try:
        container.seek(int((origin + start) / stream.time_base), stream=stream)
        first = next(container.decode(stream), None)
        if first is None or first.time is None or first.time - origin > start + _TICK:
            container.seek(0 if stream.start_time > 0 else stream.start_time, stream=stream)
            return None
        container.seek(int((origin + start) / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        container.seek(stream.start_time, stream=stream)
        return None
    return origin


class Clock:
    """FFmpeg's best-effort time of a frame, which PyAV does not pass on.

    The presentation times count as long as they went back no oftener than the decoding times, which take over from
    there: AVI, for one, has only the latter.

    Source: guess_correct_pts of libavcodec/decode.c.
    """

    def __init__(self) -> None:
        self._last: dict[str, int | None] = {"pts": None, "dts": None}
        self._faults = {"pts": 0, "dts": 0}

    def __call__(self, frame: VideoFrame) -> float | None:
        times = {"pts": frame.pts, "dts": frame.dts}
        for name, other in (("dts", "pts"), ("pts", "dts")):
            time, last = times[name], self._last[name]
            if time is not None:
                self._faults[name] += last is not None and time <= last
                self._last[name] = time
            elif times[other] is not None:
                self._last[name] = times[other]
        good = self._faults["pts"] <= self._faults["dts"] or frame.dts is None
        ticks = frame.pts if good and frame.pts is not None else frame.dts
        return None if ticks is None or frame.time_base is None else float(ticks * frame.time_base)


class Deinterlacer:
    """bwdif: one frame for each, one frame later; progressive ones among them stay as they are."""

    def __init__(self, frame: VideoFrame) -> None:
        self._shape = _shape(frame)
        self._graph = Graph()
        self._graph.threads = 1  # many processes decode at once
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
        )
        filter_ = self._graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        self._graph.link_nodes(source, filter_, self._graph.add("buffersink")).configure()
        self._waiting: deque[Timed] = deque()

    def fits(self, frame: VideoFrame) -> bool:
        """Whether a frame has the size and the format that this one was made for."""
        return self._shape == _shape(frame)

    def __call__(self, timed: Timed) -> Iterator[Timed]:
        """What is ready once a frame has been pushed."""
        self._waiting.append(timed)
        yield from self._push(timed.frame)

    def rest(self) -> Iterator[Timed]:
        """What is still inside."""
        yield from self._push(None)

    def _push(self, frame: VideoFrame | None) -> Generator[Timed, None, None]:
        self._graph.push(frame)
        with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
            while self._waiting:
                ready = self._graph.vpull()
                was = self._waiting.popleft()
                yield Timed(ready, was.time, was.seconds, was.damaged)


def _shape(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name
