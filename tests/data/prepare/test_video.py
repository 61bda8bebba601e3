"""Decoding real files: pace, size, rotation, colour, and what is wrong with bad ones."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

from data.errors import DataError
from data.prepare import frames, scaling
from data.prepare.scaling import nearest_size
from data.prepare.video import Clip, probe, read_clips
from tests.helpers.videos import number_of, numbered, write_sound, write_video


def codecs() -> list[str]:
    """The encoders of this build of FFmpeg."""
    found = []
    for name in ("libx264", "libx265", "libvpx-vp9", "mpeg4"):
        try:
            av.Codec(name, "w")
        except ValueError:
            continue
        found.append(name)
    return found


def clips_of(
    path: Path, frames: int = 10, fps: float = 16, size: tuple[int, int] = (64, 96), **more: Any
) -> list[Clip]:
    return list(read_clips(path, fps=fps, frames=frames, sizes=[size], **more))


def numbers(clip: Clip) -> list[int]:
    return [number_of(picture) for picture in clip.frames]


def check_times(clip: Clip, times: list[float], fps: float) -> None:
    """Each frame is the one that a player shows at its time; containers keep times to a millisecond or two."""
    for k, shown in enumerate(numbers(clip)):
        near = [max((i for i, t in enumerate(times) if t <= k / fps + slack), default=0) for slack in (-2e-3, 2e-3)]
        assert shown in range(near[0], near[1] + 1), (k, shown, near)


def test_this_build_has_the_codecs_that_matter() -> None:
    assert {"libx264", "libvpx-vp9"} <= set(codecs())


@pytest.mark.parametrize("codec", codecs())
def test_every_codec_gives_the_frames_in_order(tmp_path: Path, codec: str) -> None:
    path = write_video(tmp_path / ("v.webm" if codec == "libvpx-vp9" else "v.mp4"), 35, codec=codec)
    info = probe(path)
    assert (info.height, info.width, info.fps) == (64, 96, 16) and info.frames_at(16) == 35
    clips = clips_of(path)
    assert [(clip.index, clip.start) for clip in clips] == [(0, 0), (1, 0.625), (2, 1.25)]
    assert [n for clip in clips for n in numbers(clip)] == list(range(30))
    assert clips[0].frames.shape == (10, 64, 96, 3) and clips[0].frames.dtype == np.uint8


@pytest.mark.parametrize(("source", "target"), [(30, 16), (24, 30), (50, 24), (60, 16)])
def test_another_pace_shows_what_a_player_shows(tmp_path: Path, source: int, target: int) -> None:
    path = write_video(tmp_path / "v.mp4", 60, fps=source)
    (clip,) = clips_of(path, frames=math.floor(60 / source * target), fps=target)
    check_times(clip, [i / source for i in range(60)], target)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_a_variable_rate_follows_the_clock(tmp_path: Path, name: str) -> None:
    gaps = [0.02, 0.05, 0.3, 0.04, 0.125, 0.06] * 8
    times = [sum(gaps[:i]) for i in range(len(gaps))]
    (clip,) = clips_of(write_video(tmp_path / name, len(times), times=times, fps=1000), frames=64)
    check_times(clip, times, 16)


def test_clips_are_counted_and_skipped(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 45)
    assert [clip.index for clip in clips_of(path, most=2)] == [0, 1]
    rest = clips_of(path, skip={0, 2})
    assert [(clip.index, clip.start, numbers(clip)[0]) for clip in rest] == [(1, 0.625, 10), (3, 1.875, 30)]


def test_odd_sizes_and_buckets(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 12, height=75, width=133, pixels="yuv444p")
    assert (probe(path).height, probe(path).width) == (75, 133)
    sizes = [(32, 32), (64, 32), (32, 64)]
    (clip,) = read_clips(path, fps=16, frames=12, sizes=sizes)
    assert clip.frames.shape == (12, 32, 64, 3) and numbers(clip) == list(range(12))
    assert nearest_size(100, 99, sizes) == (32, 32) and nearest_size(1920, 1080, sizes) == (64, 32)


def test_the_centre_is_kept_and_not_stretched(tmp_path: Path) -> None:
    disc = np.zeros((120, 240, 3), np.uint8)
    y, x = np.mgrid[:120, :240]
    disc[(y - 60) ** 2 + (x - 120) ** 2 < 40**2] = 255
    (clip,) = clips_of(
        write_video(tmp_path / "v.mp4", 4, height=120, width=240, picture=lambda i: disc), 4, size=(64, 64)
    )
    white = clip.frames[2].mean(axis=2) > 127
    rows, columns = np.nonzero(white.any(axis=1))[0], np.nonzero(white.any(axis=0))[0]
    expected = 2 * 40 * 64 / 120
    assert abs(len(rows) - expected) <= 2 and abs(len(columns) - expected) <= 2
    assert abs(rows.mean() - 31.5) < 1.5 and abs(columns.mean() - 31.5) < 1.5


def test_wide_pixels_are_made_square(tmp_path: Path) -> None:
    def anamorphic(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = 2

    narrow = np.zeros((64, 96, 3), np.uint8)
    y, x = np.mgrid[:64, :96]
    narrow[(y - 31.5) ** 2 + (2 * (x - 47.5)) ** 2 < 24**2] = 255
    path = write_video(tmp_path / "v.mp4", 8, before=anamorphic, picture=lambda i: narrow)
    assert (probe(path).height, probe(path).width) == (64, 192)
    (clip,) = clips_of(path, 8, size=(64, 64))
    white = clip.frames[4].mean(axis=2) > 127
    assert abs(white.any(axis=1).sum() - 48) <= 2 and abs(white.any(axis=0).sum() - 48) <= 3, "a disc is round"


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        probe(path)
    return str(caught.value)


def test_files_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video " * 50, encoding="utf-8")
    headless = write_video(tmp_path / "headless.mp4")
    headless.write_bytes(headless.read_bytes()[: headless.read_bytes().index(b"moov")])
    short = write_video(tmp_path / "short.mp4")
    short.write_bytes(short.read_bytes()[:-600])
    for curve, name in ((16, "PQ"), (18, "HLG")):
        hdr = write_video(tmp_path / "hdr.mp4", 4, before=lambda s, c=curve: setattr(s.codec_context, "color_trc", c))
        assert f"HDR video ({name}), expected standard range" in refused(hdr)
    assert refused(write_sound(tmp_path / "sound.mp4")) == "no video stream"
    for name in ("empty.mp4", "headless.mp4"):
        assert refused(tmp_path / name) == "Invalid data found when processing input"
    assert refused(tmp_path / "text.mp4")
    assert refused(short).startswith("its header is damaged")
    assert "No such file" in refused(tmp_path / "gone.mp4")


def noisy(i: int) -> np.ndarray:
    """A numbered picture that takes some bytes to store."""
    noise = np.random.default_rng(i).integers(0, 60, (64, 96, 3), dtype=np.uint8)
    return np.clip(numbered(i).astype(int) + noise - 30, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_a_truncated_file_keeps_the_clips_before_its_end(tmp_path: Path, name: str) -> None:
    container = {"movflags": "faststart"} if name.endswith("mp4") else {}
    path = write_video(tmp_path / name, 80, picture=noisy, container=container)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clips: list[Clip] = []
    with pytest.raises(DataError, match=r"truncated: ends after|Invalid data|damaged"):
        for clip in read_clips(path, fps=16, frames=10, sizes=[(64, 96)]):
            clips.append(clip)
    assert 2 <= len(clips) <= 5
    assert [n for clip in clips for n in numbers(clip)] == list(range(10 * len(clips)))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.flv"])
def test_a_video_that_starts_late_is_as_long_as_its_pictures(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 40, times=[2 + i / 16 for i in range(40)])
    assert probe(path).frames_at(16) == 40
    assert [n for clip in clips_of(path) for n in numbers(clip)] == list(range(40))


@pytest.mark.parametrize(("tags", "seconds"), [({}, 3.0), ({"_STATISTICS_TAGS": "BPS DURATION"}, 5.0)])
def test_a_tag_of_matroska_is_the_end_or_the_length(tags: dict[str, str], seconds: float) -> None:
    """FFmpeg's and mkvmerge's."""
    metadata = {"DURATION": "00:00:05.000000000", **tags}
    container = SimpleNamespace(format=SimpleNamespace(name="matroska,webm"))
    stream = SimpleNamespace(
        duration=None, start_time=2000, time_base=Fraction(1, 1000), metadata=metadata, container=container
    )
    assert frames.stream_seconds(stream) == seconds


@pytest.mark.parametrize("sound", [False, True])
def test_an_flv_has_its_file_s_length(tmp_path: Path, sound: bool) -> None:
    """By which its clips are counted; with sound, which may be longer, its end says nothing of a cut."""
    path = write_video(tmp_path / "v.flv", 80, picture=noisy, options={"g": "10"}, sound=sound)
    assert probe(path).frames_at(16) == 80 and len(clips_of(path)) == 8
    with av.open(str(path)) as file:
        cut = [packet.pos for packet in file.demux(video=0)][35]
    path.write_bytes(path.read_bytes()[:cut])
    if sound:
        assert len(clips_of(path)) == 3
    else:
        with pytest.raises(DataError, match=r"truncated: ends after 2.19 s, its header says 5.00 s"):
            clips_of(path)


def test_a_wmv_whose_sound_is_longer_is_no_truncated_one(tmp_path: Path) -> None:
    """FFmpeg gives its picture the length of the file."""
    path = tmp_path / "v.wmv"
    with av.open(str(path), "w") as file:
        picture, sound = file.add_stream("wmv2", 24), file.add_stream("wmav2", 44100, layout="mono")
        picture.width, picture.height, picture.pix_fmt, sound.bit_rate = 96, 64, "yuv420p", 64_000
        for number in range(48):
            file.mux(picture.encode(av.VideoFrame.from_ndarray(noisy(number), "rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 3 * 44100), np.float32), "fltp", "mono")  # a second more
        samples.sample_rate, samples.pts, samples.time_base = 44100, 0, Fraction(1, 44100)
        file.mux(sound.encode(samples))
        file.mux([*picture.encode(), *sound.encode()])
    with av.open(str(path)) as file:
        assert float(file.streams.video[0].duration * file.streams.video[0].time_base) > 2.8
    assert len(list(read_clips(path, fps=24, frames=16, sizes=[(64, 96)]))) == 3


def check_jump(path: Path, reason: str, good: int) -> None:
    """The clips before the jump are kept, and nothing after it."""
    clips: list[Clip] = []
    with pytest.raises(DataError, match=reason):
        for clip in read_clips(path, fps=16, frames=10, sizes=[(64, 96)]):
            clips.append(clip)
    assert [n for clip in clips for n in numbers(clip)] == list(range(good))


@pytest.mark.parametrize(("gap", "place"), [(3600, 40), (7, 25)])
def test_a_clock_that_jumps_ends_the_video(tmp_path: Path, gap: int, place: int) -> None:
    """An hour between two pictures is no hour of frozen clips."""
    times = [i / 16 + (gap if i >= place else 0) for i in range(80)]
    path = write_video(tmp_path / "v.mkv", 80, times=times, fps=1000)
    check_jump(path, rf"time jumps by {gap}.06 s at {(place - 1) / 16:.1f}", place // 10 * 10)


def test_a_clock_that_goes_back_ends_the_video(tmp_path: Path) -> None:
    """Two recordings in one file."""
    path = write_video(tmp_path / "v.ts", 25)
    path.write_bytes(path.read_bytes() * 2)
    check_jump(path, r"time jumps by -1.50 s at 1.50 s", 20)


def test_a_picture_that_ends_a_video_for_long_is_a_jump(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 25, times=[i / 16 for i in range(24)] + [60.0], fps=1000)
    with pytest.raises(DataError, match=r"time jumps by 58.56 s at 1.4"):
        clips_of(path)
    quiet = write_video(tmp_path / "quiet.mp4", 33, times=[i / 16 for i in range(16)] + [5 + i / 16 for i in range(17)])
    assert len(clips_of(quiet)) == 9, "five seconds without a change are told by no jump"


def test_a_frame_that_cannot_be_scaled_is_the_video_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def reformat(self, *arguments: Any, **more: Any) -> Any:
            raise av.error.ArgumentError(22, "Invalid argument")

    monkeypatch.setattr(scaling, "VideoReformatter", Refuses)
    with pytest.raises(DataError, match="a frame cannot be scaled: Invalid argument"):
        clips_of(write_video(tmp_path / "v.mp4", 12))


def test_h264_damaged_in_the_middle_is_refused_from_there(tmp_path: Path) -> None:
    """What FFmpeg's h264 reports. Flipped bits of hevc or vp9 may pass: their decoders hide some without a word."""
    path = write_video(tmp_path / "v.mp4", 80, picture=noisy)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(bytes(content))
    clips: list[Clip] = []
    with pytest.raises(DataError):
        for clip in read_clips(path, fps=16, frames=10, sizes=[(64, 96)]):
            clips.append(clip)
    assert len(clips) >= 1 and [n for clip in clips for n in numbers(clip)] == list(range(10 * len(clips)))
