"""Nothing of a list goes missing without a word: unclosed quotes, linked folders, files that are left aside."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from data.errors import DataError
from data.io.lines import lines_of, read_utf8
from data.prepare.__main__ import main
from data.prepare.parquet_table import ParquetTable
from data.prepare.selection import select
from data.prepare.sources import Columns, read_source
from data.prepare.tables import open_table
from data.shards.manifest import Manifest
from radial.errors import Mistake
from tests.helpers.prepared import FAST
from tests.helpers.videos import write_video

ODD = "\u2028\u2029\x85\v\f"
"""What Unicode and Python call ends of lines besides the line feed."""


@pytest.mark.parametrize(("text", "message"), [
    # The next row's quote closes it: two rows would be one.
    ('v0.mp4,"one\nv1.mp4,"two"\nv2.mp4,three\n', r"line 3 goes on behind a closing quote, and the quotes of the "
     r"row that begins in line 2 are out of step"),
    # A later row's quote closes it at the end of a field: file names would be a caption.
    ('v0.mp4,"one\nv1.mp4,two\nv2.mp4,three"\nv3.mp4,four\n', r"a quote opened in line 2 closes in line 4 only, and "
     r"line 3 between them looks like a row"),
    ('v0.mp4,one\nv1.mp4,"two\nv2.mp4,three\n', r"a quote opened in line 3 is never closed"),
    ('v0.mp4,"one" and more\n', r"line 2 goes on behind a closing quote;"),
    ("v0.mp4,one\rv1.mp4,two\n", r"line 2 holds a carriage return outside quotes"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_quotes_that_are_not_closed_are_told_with_their_line(
    tmp_path: Path, text: str, message: str, kind: str
) -> None:
    source = tmp_path / f"list.{kind}"
    text = f"path,caption\n{text}"
    source.write_text(text if kind == "csv" else text.replace(",", "\t"), encoding="utf-8", newline="")
    with pytest.raises(DataError, match=rf"list.{kind}: {message}.*double the quotes in it"):
        list(open_table(source).rows())


def test_quoted_fields_may_hold_anything(tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_text(
        'path,caption\r\nv0.mp4,"two lines,\nwith a comma and ""quotes"" of a.mp4"\r\nv1.mp4,5" wide\n',
        encoding="utf-8",
    )
    assert list(open_table(source).rows()) == [
        (2, {"path": "v0.mp4", "caption": 'two lines,\nwith a comma and "quotes" of a.mp4'}),
        (4, {"path": "v1.mp4", "caption": '5" wide'}),
    ]
    source.write_text("path,caption,path\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1 names the column 'path' twice"):
        list(open_table(source).rows())


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    caption = f"one{ODD}two"
    assert lines_of(f"{caption}\r\n\nlast") == [caption, "", "last"] and lines_of("a\n") == ["a"]
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"path": "v.mp4", "caption": caption.replace("\v", "").replace("\f", "")}, ensure_ascii=False),
        encoding="utf-8",
    )
    (tmp_path / "list.csv").write_text(f"path,caption\nv.mp4,{caption}\n", encoding="utf-8")
    (tmp_path / "v.mp4").touch()
    (tmp_path / "v.txt").write_text(caption, encoding="utf-8")
    for name, expected in (("list.csv", caption), ("list.jsonl", "one\u2028\u2029\x85two"), ("", caption)):
        (video,) = read_source(tmp_path / name).videos()
        assert (video.path, video.caption) == ("v.mp4", expected)


@pytest.mark.parametrize(("coding", "message"), [
    ("utf-16-le", "line 1 holds a zero byte, as UTF-16 does; save it as UTF-8"),
    ("utf-16", "is not in UTF-8 but UTF-16; save it as UTF-8"),
])  # fmt: skip
def test_other_codings_are_named(tmp_path: Path, coding: str, message: str) -> None:
    """UTF-16 without a mark is valid UTF-8, with a zero byte after each letter."""
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a red ball", encoding=coding)
    (video,) = read_source(tmp_path).videos()
    assert video.caption is None and video.problem == f"caption cannot be used: {message}"
    (tmp_path / "list.csv").write_text("path,caption\na.mp4,a red ball\n", encoding=coding)
    with pytest.raises(DataError, match=rf"list.csv: {message}"):
        read_source(tmp_path / "list.csv")
    with pytest.raises(DataError, match=message):
        read_utf8(tmp_path / "a.txt")
    (tmp_path / "list.jsonl").write_text('{"path": "a.mp4", "caption": "a\\u0000b"}', encoding="utf-8")
    (video,) = read_source(tmp_path / "list.jsonl").videos()
    assert video.caption is None and video.problem is not None and "zero byte" in video.problem


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    for path in (root / "own" / "a.mp4", elsewhere / "sub" / "b.mp4", elsewhere / "c.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(elsewhere / "sub")
    (elsewhere / "ring").symlink_to(root)
    (root / "a_link").symlink_to(root / "own")
    found = read_source(root)
    assert [video.path for video in found.videos()] == ["link/c.mp4", "link/sub/b.mp4", "own/a.mp4"]
    assert found.told == [f"{root}: not used as videos: 3 links to folders that are searched already"]


def test_what_is_left_aside_is_counted_by_kind_and_what_has_a_caption_is_named(tmp_path: Path) -> None:
    names = ["a.mp4", "a.txt", "b.gif", "b.txt", "c.jpg", "d.jpg", "d.mp4", "d.txt", "notes.txt", "README", ".x.mp4"]
    for name in names:
        (tmp_path / name).touch()
    found = read_source(tmp_path)
    assert [video.path for video in found.videos()] == ["a.mp4", "d.mp4"]
    aside, captioned = found.told
    assert aside.endswith(
        "not used as videos: 1 .gif, 2 .jpg, 2 .txt without a video of its name, 1 hidden, 1 without an ending"
    )
    assert captioned.startswith(f"{tmp_path}: b.gif have captions beside them, but do not end in .mp4, ")
    for ending in ("ogv", "3gp", "m2ts", "mts", "mxf"):
        (tmp_path / f"z.{ending}").touch()
    assert len(list(read_source(tmp_path).videos())) == 7


def test_rows_without_a_path_bytes_and_rows_that_come_twice(tmp_path: Path) -> None:
    rows = [
        {"path": b"a.mp4", "caption": "caf\u00e9".encode(), "score": 1.0},
        {"path": b"", "caption": b"b", "score": 2.0},
        {"path": b"c.mp4", "caption": b"\xff", "score": 3.0},
        {"path": b"\xff", "caption": b"d", "score": 4.0},
        {"path": b"a.mp4", "caption": b"another", "score": 5.0},
    ]
    source = tmp_path / "list.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    videos = list(read_source(source).videos())
    assert [(video.path, video.caption) for video in videos] == [
        ("a.mp4", "caf\u00e9"), ("", None), ("c.mp4", None), ("", None), ("a.mp4", "another"),
    ]  # fmt: skip
    assert [video.problem for video in videos] == [
        None, "row 2 has no path in the column path", "caption is of type bytes, expected text",
        "row 4 has a path of type bytes, expected text", None,
    ]  # fmt: skip
    found = select(source=source, videos=None, columns=Columns(), where=None, sort="score")
    best = found.matching[0]
    assert (best.path, list(found.found.captions([best]))) == ("a.mp4", ["another"])
    assert len(found.matching) == 4 and found.about == str(source), "without a where that was not given"
    assert found.told == [
        f"{source}: rows whose video an earlier row names: 1, such as a.mp4 (1 with another caption, such as a.mp4); "
        "the first of each counts"
    ]


def test_videos_that_are_not_on_disk_are_no_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a data set of which a part was downloaded; `top` counts what is there."""
    write_video(tmp_path / "videos" / "v7.mp4", 20)
    write_video(tmp_path / "videos" / "v8.mp4", 20)
    table = tmp_path / "list.csv"
    table.write_text("path,caption,score\n" + "".join(f"v{i}.mp4,clip,{-i}\n" for i in range(9)), encoding="utf-8")
    words = [f"source={table}", f"videos={tmp_path / 'videos'}", f"out={tmp_path / 'out'}", *FAST, "sort=score"]
    assert main([*words, "top=1"]) == 0
    shown = capsys.readouterr().out
    assert "7 of the listed videos are not in " in shown and "such as v0.mp4, v1.mp4, v2.mp4, …" in shown
    assert "1 videos chosen, 0 do not qualify, 7 are not on disk, 0 files are bad" in shown
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.videos, manifest.rejected) == (1, 0)
    with pytest.raises(
        DataError, match=r"9 are not on disk in .*nowhere, none is bad; correct videos= or download them"
    ):
        main([words[0], f"videos={tmp_path / 'nowhere'}", f"out={tmp_path / 'none'}", *FAST])


def test_enlarged_videos_and_repeated_frames_are_told_and_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, fps, height, width in (("fine", 16, 64, 96), ("slow", 5, 64, 96), ("small", 16, 16, 24)):
        write_video(tmp_path / "videos" / f"{name}.mp4", 3 * fps, fps=fps, height=height, width=width, caption=name)
    words = [f"source={tmp_path / 'videos'}", *FAST[:2], "size=32x48", "workers=1", "cuts=keep"]
    assert main([*words, f"out={tmp_path / 'all'}"]) == 0
    shown = capsys.readouterr().out
    assert "videos that are enlarged: 1, small.mp4 the most (16x24 to 32x48, 2.00 times); upscale=false leaves" in shown
    assert "videos whose frames are repeated, of fewer than 16 a second: 1, slow.mp4 has the fewest (5);" in shown
    assert main([*words, f"out={tmp_path / 'some'}", "upscale=false", "min_fps=16"]) == 0
    shown = capsys.readouterr().out
    assert "1 videos chosen, 2 do not qualify" in shown and "are enlarged" not in shown and "are repeated" not in shown
    with pytest.raises(Mistake, match="min_fps is 0.0, expected a positive number"):
        main([*words, f"out={tmp_path / 'none'}", "min_fps=0"])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_large_table_is_not_held_and_captions_are_those_of_the_chosen(tmp_path: Path, kind: str) -> None:
    """50 MB of captions, the first row of each row group among the chosen ones, at 4 MB of memory."""
    rows = [
        {"path": f"v{i % 4_500}.mp4", "caption": f'no. {i}, "\n{"x" * 5_000}', "score": -(i % 2_000)}
        for i in range(5_000)
    ]
    source = tmp_path / f"list.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=500)
    elif kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with source.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    # what is imported at first use is no part of it
    select(source=source, videos=None, columns=Columns(), where="score>1", sort="score")
    tracemalloc.start()
    try:
        found = select(source=source, videos=None, columns=Columns(), where="score>-1500", sort="score")
        best = found.matching[:7]
        captions = found.found.captions(best)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.listed == 5_000 and len(found.matching) == 4_000 - 500
    assert [video.path for video in best] == [f"v{i}.mp4" for i in (0, 2000, 4000, 1, 2001, 4001, 2)]
    assert list(captions) == [rows[i]["caption"] for i in (0, 2000, 4000, 1, 2001, 4001, 2)]
    assert "an earlier row names: 500, such as v0.mp4 (500 with another caption, such as v0.mp4)" in found.told[0]
    assert most < 10e6, most


def test_videos_whose_names_have_one_hash_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "list.csv"
    source.write_text("path,caption\na.mp4,a\nb.mp4,b\n", encoding="utf-8")
    monkeypatch.setattr("data.prepare.selection.hash", lambda text: 0, raising=False)
    found = select(source=source, videos=None, columns=Columns(), where=None, sort=None)
    assert [video.path for video in found.matching] == ["a.mp4", "b.mp4"] and not found.told


def test_a_list_that_changes_while_it_is_read_is_told(tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    source.write_text("path,caption\na.mp4,a\nb.mp4,b\n", encoding="utf-8")
    found = select(source=source, videos=None, columns=Columns(), where=None, sort=None)
    assert list(found.found.captions([found.matching[1], found.matching[0]])) == ["b", "a"]
    source.write_text("path,caption\na.mp4,a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"list.csv: was changed while it was read \(b.mp4\); start again"):
        found.found.captions(found.matching)


def test_rows_of_parquet_have_their_numbers_where_batches_are_short(tmp_path: Path) -> None:
    """pyarrow ends a batch with a group of rows where a column is a dictionary; files may have other columns."""
    kinds = pyarrow.array([f"k{n % 3}" for n in range(1300)]).dictionary_encode()
    names = pyarrow.array([f"{n}.mp4" for n in range(1300)])
    parquet.write_table(pyarrow.table({"path": names, "kind": kinds}), tmp_path / "1.parquet", row_group_size=100)
    parquet.write_table(pyarrow.table({"path": names, "start": list(range(1300))}), tmp_path / "2.parquet")
    table = ParquetTable([tmp_path / "1.parquet", tmp_path / "2.parquet"], tmp_path)
    rows = dict(table.rows())
    assert list(rows) == list(range(1, 2601))
    assert all(row["path"] == f"{(number - 1) % 1300}.mp4" for number, row in rows.items())
    assert [number for number, _ in table.rows(places={101, 701, 1301})] == [101, 701, 1301]
    starts = dict(table.rows(columns=["start"]))
    assert list(starts) == list(rows) and starts[1] == {} and starts[1301 + 7] == {"start": 7}


def test_a_known_collection_with_paths_of_its_own_keeps_them(tmp_path: Path) -> None:
    source = tmp_path / "list.csv"
    columns = "videoID,url,timestamp,caption,matching_score,path"
    source.write_text(
        f"{columns}\nabc,u,\"['0:00:00.000', '0:00:09.000']\",seen,0.4,clips/abc_0.mp4\n", encoding="utf-8"
    )
    (video,) = read_source(source).videos()
    assert video.path == "clips/abc_0.mp4"


def test_captions_of_all_rows_take_little_beside_their_text(tmp_path: Path) -> None:
    """Of a million chosen rows each byte is a megabyte: their places and where their captions lie, 40 bytes at most."""
    source, count, caption = tmp_path / "list.csv", 20_000, "a boat on a lake"
    lines = [f"v{i}.mp4,{caption}" for i in range(count)]
    source.write_text("\n".join(["path,caption", *lines, ""]), encoding="utf-8")
    found = select(source=source, videos=None, columns=Columns(), where=None, sort=None)
    found.found.captions(found.matching[:1])  # what is imported at first use is no part of it
    tracemalloc.start()
    try:
        captions = found.found.captions(found.matching)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(captions) == count and captions[count - 1] == caption
    assert most - count * len(caption) < 40 * count, most


def test_pieces_of_one_row_get_their_own_captions(tmp_path: Path) -> None:
    source = tmp_path / "list.jsonl"
    rows = [{"path": "a.mp4", "start": [0, 4], "end": [4, 9], "caption": ["first", "second"]}, {"path": "b.mp4"}]
    rows[1] |= {"start": None, "end": None, "caption": "whole"}
    source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = select(source=source, videos=None, columns=Columns(), where=None, sort=None)
    assert list(found.found.captions(found.matching[::-1])) == ["whole", "second", "first"]


def test_a_row_without_a_path_is_told_by_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,caption\n,a caption\n", encoding="utf-8")
    words = [f"source={table}", f"out={tmp_path / 'out'}", *FAST]
    assert main(words) == 1
    assert "all 1 files are bad, such as line 2 has no path in the column path; see" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "bad: line 2 has no path in the column path\n" in capsys.readouterr().out
