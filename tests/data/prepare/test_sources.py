"""Lists of videos: readers, conditions, ranking, and mistakes in them; the grammar of the command lines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from data.errors import DataError
from data.prepare.__main__ import Arguments, main
from data.prepare.conditions import number, parse_conditions, split_conditions
from data.prepare.listed import Listed, Video
from data.prepare.selection import Ranking, select
from data.prepare.sources import Columns
from data.prepare.sources import read_source as read
from radial.cli.reader import read as read_words
from radial.errors import Mistake


def read_source(*arguments: Any) -> tuple[list[Video], list[str]]:
    found: Listed = read(arguments[0], Columns(*arguments[1:]))
    return list(found.videos()), found.columns


ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "caption": "first, with a comma", "aesthetic score": 5.5, "motion": 1.0, "camera": "static"},
    {"video": "sub/b.mp4", "caption": "second\nline", "aesthetic score": 4.5, "motion": 9.0, "camera": "pan"},
    {"video": "c.mp4", "caption": "", "aesthetic score": None, "motion": 2.0, "camera": "static"},
    {"video": "d.mp4", "caption": "fourth", "aesthetic score": 6.0, "motion": 0.5, "camera": "static"},
]


def write_table(folder: Path, kind: str) -> Path:
    path = folder / f"list.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_list(tmp_path: Path, kind: str) -> None:
    videos, columns = read_source(write_table(tmp_path, kind))
    assert columns == ["video", "caption", "aesthetic score", "motion", "camera"]
    assert [(video.path, video.caption) for video in videos] == [
        ("a.mp4", "first, with a comma"), ("sub/b.mp4", "second\nline"), ("c.mp4", None), ("d.mp4", "fourth"),
    ]  # fmt: skip
    assert [number(video.columns["aesthetic score"]) for video in videos] == [5.5, 4.5, None, 6.0]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig"])
def test_lines_end_where_the_format_says(tmp_path: Path, coding: str) -> None:
    """Not at the other characters that Unicode calls line ends; and a byte order mark is no part of the first line."""
    text = "one\u2028two\u0085three"
    (tmp_path / "list.jsonl").write_text(
        f'{{"path": "a", "caption": "{text}"}}\r\n\n{{"path": "b", "caption": "x"}}', encoding=coding
    )
    (tmp_path / "list.csv").write_text(f"path,caption\r\na,{text}\r\nb,x\r\n", encoding=coding)
    for kind in ("jsonl", "csv"):
        videos, columns = read_source(tmp_path / f"list.{kind}")
        assert columns == ["path", "caption"] and [(v.path, v.caption) for v in videos] == [("a", text), ("b", "x")]


def test_columns_by_name(tmp_path: Path) -> None:
    path = write_table(tmp_path, "csv")
    videos, _ = read_source(path, "camera", "video")
    assert (videos[0].path, videos[0].caption) == ("static", "a.mp4")
    with pytest.raises(DataError, match="caption_column: there is no column 'captions', .*; did you mean caption"):
        read_source(path, None, "captions")


def test_a_folder_is_searched_for_videos_and_captions(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.webm", "sub/c.MKV", "notes.pdf", "._b.mp4", "sub/.hidden.mp4", ".Trash/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text(" caption of b\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    for name, coding in (("d", "utf-8-sig"), ("e", "latin-1")):
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text("caf\u00e9", encoding=coding)
    videos, columns = read_source(tmp_path)
    assert [v.problem for v in videos if v.caption is None] == [
        "no caption, a.txt is empty",
        "caption cannot be used: is not in UTF-8 (unexpected end of data, byte 3); save it as UTF-8",
        "no caption, expected c.txt beside it",
    ]
    assert columns == [] and [(v.path, v.caption) for v in videos] == [
        ("a.webm", None), ("b.mp4", "caption of b"), ("d.mp4", "caf\u00e9"), ("e.mp4", None), ("sub/c.MKV", None),
    ]  # fmt: skip


def test_what_is_no_text_is_no_caption(tmp_path: Path) -> None:
    captions = [["x", "y"], float("nan"), None, 0, "a \ud83d", "\u20ac"]
    rows = [json.dumps({"path": f"{i}.mp4", "caption": caption}) for i, caption in enumerate(captions)]
    (tmp_path / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    videos, _ = read_source(tmp_path / "list.jsonl")
    assert [video.caption for video in videos] == [None] * 5 + ["\u20ac"]
    assert [video.problem for video in videos[:5]] == [
        "caption is of type list, expected text", "no caption in the column caption, line 2",
        "no caption in the column caption, line 3", "caption is of type int, expected text",
        "caption has half a character (a lone surrogate)",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_conditions_on_every_column_of_a_table(tmp_path: Path, kind: str) -> None:
    """The path's and the caption's too; true and false as each format has them."""
    rows = [{"path": f"{name}.mp4", "caption": name, "ok": ok} for name, ok in (("a", True), ("b", False), ("c", None))]
    source = tmp_path / f"list.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    elif kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        source.write_text("path,caption,ok\na.mp4,a,True\nb.mp4,b,False\nc.mp4,c,\n", encoding="utf-8")

    def left(where: str) -> str:
        found = select(source=source, videos=None, columns=Columns(), where=where, sort=None)
        return "".join(video.path[0] for video in found.matching)

    assert left("path=b.mp4") == "b" and left("path!=b.mp4") == "ac"
    assert left("caption=a") == "a" and left("caption!=a, caption!=c") == "b"
    assert left("ok=true") == left("ok=True") == left("ok==TRUE") == "a"
    assert left("ok!=false") == "ac" and left("ok=False") == "b"


def chosen(where: str) -> list[str]:
    columns = [name for name in ROWS[0] if name not in ("video", "caption")]
    conditions, _ = split_conditions(parse_conditions(where), columns)
    return [row["video"][-5] for row in ROWS if all(condition.holds(row) for condition in conditions)]


def test_conditions() -> None:
    assert chosen("aesthetic score>4.5") == ["a", "d"]
    assert chosen("aesthetic score>=4.5, motion<=1") == ["a", "d"]
    assert chosen("camera=static and motion > 0.5") == ["a", "c"]
    assert chosen("camera!=static") == ["b"] and chosen("aesthetic score!=6") == ["a", "b", "c"]
    own, probed = split_conditions(parse_conditions("motion>1,height>=720"), ["motion"])
    assert [c.column for c in own] == ["motion"] and [c.column for c in probed] == ["height"]
    for where, message in [
        ("score", "'score' is not a condition"),
        ("motion>high", "compares with 'high', expected a number"),
        ("motion => 1", "'motion => 1' is not a condition"),
        ("motion=<1", "'motion=<1' is not a condition"),
        ("camera === pan", "'camera === pan' is not a condition"),
        ("motoin>1", "no column 'motoin', .*did you mean motion"),
    ]:
        with pytest.raises(DataError, match=message):
            chosen(where)


def test_ranking() -> None:
    columns = ["aesthetic score", "motion"]

    def order(sort: str) -> str:
        best = sorted(ROWS, key=Ranking(sort, columns).score, reverse=True)
        return "".join(row["video"][-5] for row in best)

    assert order("aesthetic score") == "dabc" and order("aesthetic score+motion") == "badc"
    with pytest.raises(DataError, match="sort: there is no column 'x'"):
        order("x")


def test_unusable_sources(tmp_path: Path) -> None:
    (tmp_path / "list.xlsx").touch()
    (tmp_path / "empty.csv").write_text("path,caption\n", encoding="utf-8")
    (tmp_path / "other.csv").write_text("id,caption\n1,x\n", encoding="utf-8")
    (tmp_path / "bad.jsonl").write_text('{"path": "a"}\n{\n', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1]\n", encoding="utf-8")
    (tmp_path / "more.csv").write_text(
        'path,caption,score\na,"two\nlines",1\n\nb,one, two, three,2\n', encoding="utf-8"
    )
    (tmp_path / "fewer.tsv").write_text("path\tcaption\na.mp4 a caption\n", encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes("path,caption\na,caf\u00e9\n".encode("latin-1"))
    (tmp_path / "bad.parquet").write_text("x", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for name, message in [
        ("gone.csv", "no such folder or table"),
        ("gone", "no such folder or table"),
        ("list.xlsx", "unknown kind of list"),
        ("empty.csv", "the table is empty"),
        ("other.csv", "no column named path or video .* found id, caption; give path_column=NAME"),
        ("bad.jsonl", "bad.jsonl: line 2 is not JSON"),
        ("list.jsonl", "list.jsonl: line 1 is not an object"),
        (
            "more.csv",
            r"more.csv: line 5 has 5 fields, the first line names 3 columns; put .* a comma",
        ),
        ("fewer.tsv", "fewer.tsv: line 2 has 1 field, the first line names 2 columns; put what holds a tab"),
        ("latin.csv", "latin.csv: is not in UTF-8 .*; save it as UTF-8"),
        ("bad.parquet", "cannot be read as parquet"),
        ("folder", "no videos in this folder"),
    ]:
        with pytest.raises(DataError, match=message):
            read_source(tmp_path / name)


def test_the_grammar_of_the_command_line(tmp_path: Path) -> None:
    given = read_words(Arguments, ["source=a=b.csv", "out=o", "where=score>4.5, x='y'", "top=null", "--image-to-video"])
    assert (given.source, given.where, given.top) == (Path("a=b.csv"), "score>4.5, x='y'", None)
    assert read_words(Arguments, ["source=s", "out=o"]).top is None, "no video is left out unasked"
    assert given.image_to_video and given.frames == "4x" and given.weights is None
    (tmp_path / "file").touch()
    (tmp_path / "v.mp4").touch()
    mistakes = [
        (["out=o"], "source is not set, give source=VALUE; folder of videos"),
        (["source=s", "out=o", "souce=t"], "souce is not a known key; did you mean source"),
        (["source=s", "source=t"], "source is given twice"),
        (["source=s", "out=o", "top=many"], "top is 'many', expected a whole number"),
        (["source=s", "out=o", "model=flux"], "model is 'flux', expected one of wan, wan22_5b, hunyuan, hunyuan15"),
        (["source=s", "out=o", "image_to_video=maybe"], "image_to_video is 'maybe', expected true or false"),
        (["source"], "'source' is not a setting, expected key=value"),
        (["--top"], "--top needs a value"),
        (["source=s", "out=o", "workers=0"], "workers is 0, expected at least 1"),
        (["source=s", "out=o", "bad_share=2"], "bad_share is 2.0, expected a number from 0 to 1"),
        (["source=s", "out=o", "model=pixels", "frames=5x"], "frames is '5x', expected a number or one of 1x, 2x, 4x"),
        (["source=s", "out=o", "model=pixels", "size=32"], "size is '32', expected HEIGHTxWIDTH"),
        (
            ["source=s", "out=o", "model=pixels", "size=33x64"],
            "size is 33x64, expected sides that divide by 4, such as",
        ),
        (
            ["source=s", "out=o", "model=hunyuan", "weights=w", "frames=10"],
            "frames is 10, expected 4 x k + 1 (the VAE compresses time by 4): use 9 or 13",
        ),
        *[
            (
                ["source=s", "out=o", f"model={model}", "weights=w", "--image-to-video"],
                f"image_to_video is true, but model={model} has no image-to-video encoder here; leave it out",
            )
            for model in ("pixels", "hunyuan", "mochi")
        ],
        (["source=s", "out=o", "model=wan22_5b", "--image-to-video"], "model=wan22_5b takes the first frame from"),
        (["source=s", f"out={tmp_path / 'file'}", "model=pixels"], "file: is a file, expected a folder for shards"),
        (["source=s", "out=o", "model=wan"], "weights is not set, model=wan needs its diffusers folder"),
        (["source=s", "out=o", "model=pixels", "weights=w"], "weights is w, but model=pixels has none"),
        (["source=", "out=o"], "source is empty, expected a path"),
        (["source=s", "out="], "out is empty, expected a path"),
        (["source=s", "out=s3://b/x"], "out is s3://b/x, expected a path on this machine"),
        *[
            ([f"source={tmp_path}", "out=o", "model=pixels", f"device={device}"], f"device is {found}")
            for device, found in (
                ("foo", "'foo', expected cpu, cuda or one GPU such as cuda:0"),
                ("meta", "'meta', expected cpu, cuda"),
                ("cuda:99", f"cuda:99, but torch {torch.__version__} finds"),
            )
        ],
        (["source=s", f"out={tmp_path / 'o'}", "model=pixels"], "s: no such folder or table"),
    ]
    for words, message in mistakes:
        with pytest.raises(Mistake) as caught:
            main(words)
        assert message in str(caught.value), (words, caught.value)
    assert not (tmp_path / "o").exists()
