"""Which frames a file shows, when and which way up: times, orientation, interlacing, the stream of several."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from data.errors import DataError
from data.prepare import frames
from data.prepare.frames import Clock, Timed, video_stream
from data.prepare.video import Clip, probe, read_clips
from tests.helpers.videos import number_of, numbered, orient, write_video


def clips_of(path: Path, frames: int = 10, size: tuple[int, int] = (64, 96)) -> list[Clip]:
    return list(read_clips(path, fps=16, frames=frames, sizes=[size]))


def numbers(clips: list[Clip]) -> list[int]:
    return [number_of(picture) for clip in clips for picture in clip.frames]


B_FRAMES = {"bf": "2", "x264-params": "b-adapt=0", "preset": "medium"}


@pytest.mark.parametrize("name", ["v.avi", "v.h264", "v.mkv", "v.ts", "v.nut"])
def test_b_frames_are_shown_in_order_whatever_the_container_says_of_their_times(tmp_path: Path, name: str) -> None:
    """AVI has decoding times only and a bare stream none: each frame is shown once, at the average rate."""
    path = write_video(tmp_path / name, 40, options=B_FRAMES)
    with av.open(str(path)) as file:
        kinds = [frame.pict_type for frame in file.decode(video=0)]
    assert av.video.frame.PictureType.B in kinds
    assert numbers(clips_of(path)) == list(range(40))


def test_mpeg_4_in_avi_with_b_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 40, codec="mpeg4", options={"bf": "2"})
    assert numbers(clips_of(path)) == list(range(40))


def best_efforts(*times: tuple[int | None, int | None]) -> list[float | None]:
    clock = Clock()
    return [clock(SimpleNamespace(pts=pts, dts=dts, time_base=Fraction(1))) for pts, dts in times]  # type: ignore[arg-type]


def test_best_effort_times_are_ffmpeg_s() -> None:
    """What `ffprobe -show_entries frame=pts,pkt_dts,best_effort_timestamp` tells of such frames."""
    assert best_efforts((1, 1), (2, 2), (3, None)) == [1, 2, 3]
    assert best_efforts((None, 2), (None, 3), (None, None)) == [2, 3, None]
    assert best_efforts((1, 2), (3, 3), (4, 4), (2, 5), (5, 6), (7, None)) == [1, 3, 4, 5, 6, 7], "AVI, times made up"
    assert best_efforts((1, 1), (2, 1), (3, 1), (2, 2), (4, 3)) == [1, 2, 3, 2, 4], "the decoding times are no better"


def timed_video(monkeypatch: pytest.MonkeyPatch, path: Path, times: list[float]) -> Path:
    """A video whose frames come with these times, in seconds."""
    write_video(path, len(times))
    honest = frames.decoded

    def decoded(container: Any, stream: Any) -> Any:
        for given, time in zip(honest(container, stream), times, strict=True):
            yield Timed(given.frame, time, given.seconds, given.damaged)

    monkeypatch.setattr(frames, "decoded", decoded)
    return path


@pytest.mark.parametrize("wrong", [{5: 3}, {5: 0}, {5: 0, 25: 3}, {5: 3, 6: 4}, {5: 3, 6: 2, 7: 3}, {39: 0}])
def test_a_time_that_goes_back_for_a_moment_is_clamped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[int, int]
) -> None:
    """To where the frame before it ends; the rest stays where it is."""
    path = timed_video(monkeypatch, tmp_path / "v.mp4", [wrong.get(i, i) / 16 for i in range(40)])
    assert numbers(clips_of(path)) == list(range(40))


def test_a_second_recording_shows_none_of_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first one, which could be a moment's mistake until the next one comes."""
    path = timed_video(monkeypatch, tmp_path / "v.mp4", [i / 16 for i in range(20)] + [i / 16 for i in range(20)])
    clips: list[Clip] = []
    with pytest.raises(DataError, match=r"time jumps by -1.19 s at 1.19 s"):
        for clip in read_clips(path, fps=16, frames=10, sizes=[(64, 96)]):
            clips.append(clip)
    assert numbers(clips) == list(range(20))


ORIENTATIONS = [m for m in itertools.product((-1, 0, 1), repeat=4) if m[0] * m[3] - m[1] * m[2] in (1, -1)
                and sum(map(abs, m)) == 2]  # fmt: skip


def turned(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Each pixel (x, y) at (a x + c y, b x + d y), moved to where both begin at 0."""
    a, b, c, d = matrix
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    out = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    out[down, right] = picture
    return out


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_turned_and_mirrored_videos_are_shown_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """All eight orientations that a display matrix can tell."""
    corners = np.zeros((64, 96, 3), np.uint8)
    corners[:32, :48], corners[:32, 48:], corners[32:, :48] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = write_video(tmp_path / "v.mp4", 12, picture=lambda i: corners)
    orient(path, matrix)
    upright = turned(corners, matrix)
    info = probe(path)
    assert (info.height, info.width) == upright.shape[:2]
    (clip,) = clips_of(path, size=(info.height, info.width))
    for frame, place in itertools.product(clip.frames[::5].astype(int), (np.s_[4:28], np.s_[-28:-4])):
        assert np.abs(frame - upright)[place, place].max() < 40


def comb(picture: np.ndarray) -> float:
    """How far odd lines lie from the mean of the lines beside them."""
    lines = picture.astype(float).mean(axis=2)
    return float(np.abs(lines[1:-1:2] - (lines[:-2:2] + lines[2::2]) / 2).mean())


def woven(i: int) -> np.ndarray:
    """A bar that moves from field to field: lower lines at time 2 i, upper ones at 2 i + 1."""
    picture = np.zeros((64, 96, 3), np.uint8)
    for later in (0, 1):
        left = (3 * (2 * i + later)) % 72
        picture[1 - later :: 2, left : left + 24] = 255
    return picture


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("v.mp4", "libx264", {"x264-params": "bff=1"}), ("v.mpg", "mpeg2video", {"flags": "+ildct+ilme", "qscale": "2"}),
])  # fmt: skip
def test_interlaced_videos_lose_their_combs(tmp_path: Path, name: str, codec: str, options: dict[str, str]) -> None:
    path = write_video(tmp_path / name, 20, codec=codec, options=options, picture=woven)
    with av.open(str(path)) as file:
        assert next(file.decode(video=0)).interlaced_frame
    (clip,) = clips_of(path, 20)
    assert comb(woven(3)) > 5 and max(comb(picture) for picture in clip.frames) < 1.5
    # The field that comes first is kept, the lower one here.
    for i, picture in enumerate(clip.frames):
        assert np.abs(picture[1::2].astype(int) - woven(i)[1::2]).mean() < 3, i


def test_a_progressive_video_passes_no_deinterlacer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data.prepare import frames

    monkeypatch.setattr(frames, "Deinterlacer", None)
    assert numbers(clips_of(write_video(tmp_path / "v.mp4", 20))) == list(range(20))


def two_streams(path: Path, dispositions: tuple[Disposition, Disposition]) -> Path:
    """A file with two video streams; frames of stream s show 100 s + i."""
    with av.open(str(path), "w") as file:
        streams: list[Any] = []
        for disposition in dispositions:
            stream: Any = file.add_stream("libx264", rate=16)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.disposition = disposition
            streams.append(stream)
        for i in range(20):
            for s, stream in enumerate(streams):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(100 * s + i), "rgb24")))
        for stream in streams:
            file.mux(stream.encode())
    return path


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize(
    ("dispositions", "chosen"), [((DEFAULT, NONE), 0), ((NONE, DEFAULT), 1), ((DEFAULT, DEFAULT), 0)]
)
def test_the_default_one_of_two_video_streams_counts(
    tmp_path: Path, dispositions: tuple[Disposition, Disposition], chosen: int
) -> None:
    path = two_streams(tmp_path / "v.mkv", dispositions)
    assert numbers(clips_of(path)) == [100 * chosen + i for i in range(20)]


def test_a_cover_picture_is_no_video() -> None:
    """Not even where it comes first and is marked as default."""
    codec = SimpleNamespace(color_trc=1)
    cover, film = (SimpleNamespace(disposition=d, codec_context=codec) for d in (COVER | DEFAULT, NONE))
    assert video_stream(SimpleNamespace(streams=SimpleNamespace(video=[cover, film]))) is film
    with pytest.raises(DataError, match="no video stream"):
        video_stream(SimpleNamespace(streams=SimpleNamespace(video=[cover])))
