"""Pieces of long videos, named by start and end, and the layouts of common collections."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av.error
import pyarrow
import pytest
from pyarrow import parquet

from data.errors import DataError
from data.prepare.__main__ import main
from data.prepare.frames import Timed, decoded
from data.prepare.listed import name_of
from data.prepare.sources import Columns, read_source
from data.prepare.spans import Span, seconds_of, spans_of, texts_of
from data.prepare.video import Clip, read_clips
from data.shards.stream import read_samples
from tests.helpers.prepared import FAST, write_clips
from tests.helpers.videos import number_of, write_video


@pytest.mark.parametrize(("row", "expected"), [
    ({"start": 1.5, "end": 4}, [Span(1.5, 4.0)]),
    ({"start": "0:01:02.500", "end": "1:05"}, [Span(62.5, 65.0)]),
    ({"start": "", "end": "12.5"}, [Span(0.0, 12.5)]),
    ({"start": 3, "end": None}, [Span(3.0, None)]),
    ({"start": None, "end": float("nan")}, []),
    ({"start_frame": 30, "end_frame": "90"}, [Span(30.0, 90.0, True)]),
    ({"startFrame": 30, "endFrame": 90}, [Span(30.0, 90.0, True)]),
    ({"framestamp": "[10108, 11946]"}, [Span(10108.0, 11946.0, True)]),
    ({"FRAME_RANGE": [3, 9]}, [Span(3.0, 9.0, True)]),
    ({"timeframe": [3, 9]}, [Span(3.0, 9.0)]),
    ({"timestamp": "[['0:00:01.000', '0:00:05.000'], ['0:00:07.250', '0:00:09.000']]"}, [Span(1, 5), Span(7.25, 9)]),
    ({"timestamp": "['0:01:33.766', '0:01:48.266']"}, [Span(93.766, 108.266)]),
    ({"timestamp": [0.5, 2.0]}, [Span(0.5, 2.0)]),
    ({"start": [0, 4], "end": [2, 6]}, [Span(0, 2), Span(4, 6)]),
])  # fmt: skip
def test_times_are_read_as_tables_write_them(row: dict[str, Any], expected: list[Span]) -> None:
    names = list(row)
    assert spans_of(row, names[0], names[-1]) == expected


@pytest.mark.parametrize(("row", "message"), [
    ({"start": "soon", "end": 4}, "'soon' is no time, expected seconds, MM:SS or HH:MM:SS.mmm"),
    ({"start": 5, "end": 4}, "a piece from 5 to 4, expected an end after its start"),
    ({"start": [1, 2], "end": [3]}, "start holds 2 times and end 1, expected as many"),
    ({"timestamp": [[1, 2, 3]]}, r"timestamp is \[\[1, 2, 3\]\], expected \[start, end\] or a list of such pairs"),
])  # fmt: skip
def test_what_is_no_time_is_named(row: dict[str, Any], message: str) -> None:
    names = list(row)
    with pytest.raises(DataError, match=message):
        spans_of(row, names[0], names[-1])
    with pytest.raises(DataError, match="2 captions for 3 pieces"):
        texts_of("['a', 'b']", 3)
    assert seconds_of("1:00:00,5") == 3600.5


@pytest.mark.parametrize(("name", "options"), [
    ("v.mp4", {"g": "12", "bf": "2"}), ("v.mp4", {"g": "250"}), ("v.mkv", {"g": "7"}), ("v.ts", {"g": "12", "bf": "2"}),
    ("v.avi", {"g": "12"}), ("v.avi", {"g": "12", "bf": "2"}),
])  # fmt: skip
def test_a_piece_holds_the_frames_of_its_time(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    """Exactly those that the same places of the whole video have, whatever key frames lie around."""
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = write_video(tmp_path / name, 120, codec=codec, options=options)
    for start, end in ((0, 40), (1, 21), (30, 60), (47, 90), (100, 120), (101, None)):
        until = None if end is None else end / 16
        pieces = list(read_clips(path, fps=16, frames=10, sizes=[(64, 96)], start=start / 16, end=until))
        count = ((120 if end is None else end) - start) // 10
        assert [clip.start * 16 for clip in pieces if isinstance(clip, Clip)] == [start + 10 * k for k in range(count)]
        for clip in pieces:
            assert isinstance(clip, Clip)
            assert [number_of(frame) for frame in clip.frames] == [round(clip.start * 16) + k for k in range(10)]
    with pytest.raises(DataError, match="no frame can be decoded"):
        list(read_clips(path, fps=16, frames=10, sizes=[(64, 96)], start=60, end=70))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_the_last_picture_of_a_piece_stays_until_its_end(tmp_path: Path, name: str) -> None:
    """Also where the rate varies, and the file says less of how long each is shown than the times of the next do."""
    times = [k / 16 for k in range(32)] + [2 + k * 0.4 for k in range(20)]
    path = write_video(tmp_path / name, len(times), times=times)
    (whole,) = read_clips(path, fps=16, frames=140, sizes=[(64, 96)])
    assert isinstance(whole, Clip)
    for start, end in ((0, 45), (20, 60), (43, 63), (71, 74), (80, 138)):
        (clip,) = read_clips(path, fps=16, frames=end - start, sizes=[(64, 96)], start=start / 16, end=end / 16)
        assert isinstance(clip, Clip)
        assert [number_of(frame) for frame in clip.frames] == [number_of(frame) for frame in whole.frames[start:end]]


def test_the_last_picture_before_damage_counts_in_a_piece_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "v.mp4", 60)

    def damaged(container: Any, stream: Any) -> Iterator[Timed]:
        for number, timed in enumerate(decoded(container, stream)):
            if number == 30:
                raise av.error.InvalidDataError(0, "damaged")
            yield timed

    monkeypatch.setattr("data.prepare.frames.decoded", damaged)
    found = read_clips(path, fps=16, frames=10, sizes=[(64, 96)], start=10 / 16, end=50 / 16)
    assert [clip.start * 16 for clip in itertools.islice(found, 2) if isinstance(clip, Clip)] == [10, 20]
    with pytest.raises(DataError, match="damaged"):
        next(found)


def test_a_piece_at_another_pace_starts_on_its_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 200, fps=Fraction(24), options={"g": "12"})
    (clip,) = read_clips(path, fps=16, frames=20, sizes=[(64, 96)], start=2.0, end=3.25)
    assert isinstance(clip, Clip) and clip.start == 2.0
    assert [number_of(frame) for frame in clip.frames] == [48 + int(k * 1.5) for k in range(20)]


def test_pieces_reach_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of one video with a caption each, in seconds; one of another in frames; one that ends behind its video."""
    videos = tmp_path / "videos"
    for i in (0, 1):
        write_clips(videos, i, 40)
    table = tmp_path / "list.jsonl"
    rows = [
        {"video": "v0.mp4", "timestamp": [[0.25, 0.95], ["0:00:01.25", "0:00:02.50"]], "caption": ["one", "two"]},
        {"video": "v1.mp4", "timestamp": "[1.25, 9]", "caption": "late"},
        {"video": "v1.mp4", "timestamp": [2, 1], "caption": "backwards"},
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"source={table}", f"videos={videos}", f"out={tmp_path / 'out'}", *FAST]
    assert main([*words, "bad_share=1"]) == 0
    found = {(s.meta["source"], s.meta["clip_start"], s.caption): s for s in read_samples(tmp_path / "out")}
    starts = [("v0.mp4", 0.25, "one"), ("v0.mp4", 1.25, "two"), ("v0.mp4", 1.875, "two")]
    assert list(found) == [*starts, ("v1.mp4", 1.25, "late"), ("v1.mp4", 1.875, "late")]
    for (source, start, _), sample in found.items():
        first = ((sample.latent[:, 0].permute(1, 2, 0).float() + 1) * 127.5).numpy()
        assert number_of(first) == 40 * int(source[1]) + round(start * 16)
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8")
    assert "line 3: a piece from 2 to 1, expected an end after its start" in rejected
    capsys.readouterr()
    rows[0]["timestamp"] = [[0.25, 0.95], [1.25, 2.5]]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main([*words, "bad_share=1"]) == 0
    assert "already there" in capsys.readouterr().out


def test_frames_are_counted_at_the_rate_of_the_file(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 100, fps=32)
    (tmp_path / "list.csv").write_text("path,caption,start_frame,end_frame\nv.mp4,a,32,72\n", encoding="utf-8")
    assert main([f"source={tmp_path / 'list.csv'}", f"out={tmp_path / 'out'}", *FAST]) == 0
    assert [s.meta["clip_start"] for s in read_samples(tmp_path / "out")] == [1.0, 1.625]


def listed(source: Path, *asked: Any) -> list[tuple[str, str | None]]:
    return [(name_of(video), video.caption) for video in read_source(source, Columns(*asked)).videos()]


def test_common_collections_need_no_options(tmp_path: Path) -> None:
    web = tmp_path / "webvid.csv"
    web.write_text(
        "videoid,contentUrl,duration,page_dir,name\n12,https://x/12.mp4,PT0H0M9S,000001_000050,A cat\n",
        encoding="utf-8",
    )
    assert listed(web) == [("000001_000050/12.mp4", "A cat")]
    panda = tmp_path / "panda.csv"
    panda.write_text(
        "videoID,url,timestamp,caption,matching_score\n"
        """aB-1,https://x,"[['0:00:01.000', '0:00:05.5'], ['0:01:07', '0:01:09']]","['A cat', 'Its tail']",0.5\n""",
        encoding="utf-8",
    )
    assert listed(panda) == [("aB-1.mp4[1-5.5]", "A cat"), ("aB-1.mp4[67-69]", "Its tail")]
    koala = tmp_path / "koala.csv"
    koala.write_text(
        "videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,video_training_suitability_score\n"
        """a_B-1_0,https://x,"['0:00:01.000', '0:00:05.500']",A cat,0.9,5.3,22.0,4.5\n"""
        """a_B-1_12,https://x,"['0:01:07.000', '0:01:09.000']",Its tail,0.9,5.3,22.0,4.1\n""",
        encoding="utf-8",
    )
    assert listed(koala) == [("a_B-1.mp4[1-5.5]", "A cat"), ("a_B-1.mp4[67-69]", "Its tail")]
    mira = tmp_path / "mira.csv"
    mira.write_text(
        "clip_id,source,video_id,timestamp,framestamp,file_path,short_caption,dense_caption\n"
        """1.2,games,x,"['00:05:36.933', '00:06:38.200']","[10108, 11946]",video/1.2.mp4,A cat,A cat on a mat\n""",
        encoding="utf-8",
    )
    assert listed(mira) == [("video/1.2.mp4", "A cat on a mat")], "the file is the piece"
    assert listed(mira, None, "short_caption", "timestamp", "timestamp") == [("video/1.2.mp4[336.933-398.2]", "A cat")]
    fun = tmp_path / "fun.json"
    fun.write_text(json.dumps([{"file_path": "train/1.mp4", "text": "A dog", "type": "video"}]), encoding="utf-8")
    assert listed(fun) == [("train/1.mp4", "A dog")]
    fun.write_text(json.dumps({"a.mp4": {"caption": "A bird"}}), encoding="utf-8")
    assert listed(fun) == [("a.mp4", "A bird")]
    (tmp_path / "media.jsonl").write_text('{"media_path": "b.mp4", "caption": "A fish"}\n', encoding="utf-8")
    assert listed(tmp_path / "media.jsonl") == [("b.mp4", "A fish")]
    folder = tmp_path / "lines"
    folder.mkdir()
    (folder / "videos.txt").write_text("videos/a.mp4\nvideos/b.mp4\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("first\nsecond\n", encoding="utf-8")
    assert listed(folder) == [("videos/a.mp4", "first"), ("videos/b.mp4", "second")]
    (folder / "prompts.txt").write_text("first\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"videos.txt has 2 lines and prompts.txt 1, expected a caption for each video"):
        listed(folder)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "metadata.jsonl").write_text('{"file_name": "c.mp4", "text": "A frog"}\n', encoding="utf-8")
    assert listed(hub) == [("c.mp4", "A frog")]
    with pytest.raises(DataError, match=r"start_column: there is no column 'begins'"):
        listed(hub, None, None, "begins")
    (tmp_path / "bad.json").write_text('{"a": 1', encoding="utf-8")
    with pytest.raises(DataError, match=r"bad.json: is not JSON .* name it .jsonl"):
        listed(tmp_path / "bad.json")


def test_a_date_is_no_piece(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(
        '{"path": "a.mp4", "caption": "a", "timestamp": "2024-01-02T03:04:05"}\n', encoding="utf-8"
    )
    assert listed(tmp_path / "list.jsonl") == [("a.mp4", "a")]


def test_json_beside_a_video_has_its_caption_and_columns(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for i, more in enumerate(({"score": 3}, {"score": 9, "caption": "of the json"}, {"score": 7, "text": "seven"})):
        path = write_clips(videos, i, 12)
        path.with_suffix(".json").write_text(json.dumps(more), encoding="utf-8")
    (videos / "v2.txt").unlink()
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, "where=score>5", "sort=score"]
    assert main(words) == 0
    found = [(s.meta["source"], s.caption) for s in read_samples(tmp_path / "out")]
    assert found == [("v1.mp4", "clip of video 1"), ("v2.mp4", "seven")], "a .txt goes before"
    (videos / "v2.json").write_text("[1]", encoding="utf-8")
    (video,) = (v for v in read_source(videos).videos() if v.path == "v2.mp4")
    assert video.problem == "v2.json cannot be used: v2.json is not an object, expected {...}"


def test_parquet_rows_may_hold_the_videos_themselves(tmp_path: Path) -> None:
    content = [write_clips(tmp_path / "videos", i, 20 + i).read_bytes() for i in (0, 1)]
    rows = [
        {"video": {"bytes": b, "path": f"v{i}.mp4"}, "caption": f"clip of video {i}"} for i, b in enumerate(content)
    ]
    table = tmp_path / "train-00000.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=1)
    assert main([f"source={table}", f"out={tmp_path / 'out'}", *FAST]) == 0
    found = list(read_samples(tmp_path / "out"))
    assert [(s.meta["source"], s.caption) for s in found] == [
        (f"train-00000.parquet/{i}/v{i}.mp4", f"clip of video {i}") for i in (0, 0, 1, 1)
    ]
    first = ((found[2].latent[:, 0].permute(1, 2, 0).float() + 1) * 127.5).numpy()
    assert number_of(first) == 40


@pytest.mark.parametrize("inner", ["", "data"])
def test_a_folder_of_parquet_files_is_one_table(tmp_path: Path, inner: str) -> None:
    """As Hugging Face's data sets are stored, in several files."""
    folder = tmp_path / "hub" / inner
    folder.mkdir(parents=True)
    for i in range(3):
        content = [write_clips(tmp_path / "videos", n, 10).read_bytes() for n in (2 * i, 2 * i + 1)]
        rows = [
            {"video": {"bytes": b, "path": "v.mp4"}, "caption": f"clip of video {2 * i + k}", "score": 2 * i + k}
            for k, b in enumerate(content)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"train-0000{i}-of-00003.parquet")
    words = [f"source={tmp_path / 'hub'}", f"out={tmp_path / 'out'}", *FAST, "where=score>0", "sort=score"]
    assert main(words) == 0
    found = list(read_samples(tmp_path / "out"))
    names = [f"train-0000{n // 2}-of-00003.parquet/{n % 2}/v.mp4" for n in (5, 4, 3, 2, 1)]
    assert [s.meta["source"] for s in found] == [f"{inner}/{name}".lstrip("/") for name in names]
    for sample, n in zip(found, (5, 4, 3, 2, 1), strict=True):
        first = ((sample.latent[:, 0].permute(1, 2, 0).float() + 1) * 127.5).numpy()
        assert (number_of(first), sample.caption) == (40 * n, f"clip of video {n}")
