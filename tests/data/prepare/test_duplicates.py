"""Videos that are there twice, and videos without a caption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.errors import DataError
from data.prepare.__main__ import main
from data.prepare.duplicates import fingerprint_of
from data.shards.stream import read_samples
from tests.helpers.prepared import FAST
from tests.helpers.scenes import HEIGHT, WIDTH, Scene, cut_together, lit, pan
from tests.helpers.videos import write_video


def again(path: Path, scene: Scene, count: int) -> Path:
    """The scene encoded otherwise: of another quality, with other key frames."""
    frames, worse = [scene(k) for k in range(count)], {"crf": "34", "g": "7"}
    return write_video(
        path,
        count,
        height=HEIGHT,
        width=WIDTH,
        picture=frames.__getitem__,
        caption="again",
        options=worse,
    )


def test_duplicates_are_said_once_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file, a worse copy and a brighter one; not another part of the same world, nor another length."""
    videos = tmp_path / "videos"
    scene = pan(1, 2)
    first = cut_together(videos / "a.mp4", [(scene, 40)], caption="first")
    shutil.copy(first, videos / "b_same.mp4")
    (videos / "b_same.txt").write_text("same", encoding="utf-8")
    again(videos / "c_worse.mp4", scene, 40)
    again(videos / "d_brighter.mp4", lit(scene, lambda k: 1.15), 40)
    again(videos / "e_other_part.mp4", lambda k: scene(k + 200), 40)
    again(videos / "f_longer.mp4", scene, 60)
    again(videos / "g_other.mp4", pan(2, 2), 40)
    words = [f"source={videos}", f"out={tmp_path / 'out'}", *FAST, "clips=1"]
    assert main([*words, "dedup=true"]) == 0
    kept = ["a.mp4", "e_other_part.mp4", "f_longer.mp4", "g_other.mp4"]
    assert [s.meta["source"] for s in read_samples(tmp_path / "out")] == kept
    shown = capsys.readouterr().out
    assert shown.count("duplicates, left out") == 1
    assert "duplicates, left out: 3, such as b_same.mp4, which is a.mp4 once more" in shown
    again(videos / "A_before_all.mp4", scene, 40)  # listed first, but its twin is encoded
    assert main([*words, "dedup=true"]) == 0
    assert "already there" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"was begun with dedup=True \(asked: False\)"):
        main(words)


def test_fingerprints_of_what_cannot_be_looked_at(tmp_path: Path) -> None:
    assert fingerprint_of(tmp_path / "gone.mp4", 0.0, None) is None
    assert (
        fingerprint_of(cut_together(tmp_path / "black.mp4", [(lit(pan(1, 1), lambda k: 0.0), 20)]), 0.0, None) is None
    )


def test_captions_that_are_missing(tmp_path: Path) -> None:
    cut_together(tmp_path / "a.mp4", [(pan(1, 1), 12)])
    table = tmp_path / "list.jsonl"
    rows = [{"path": "a.mp4", "caption": None, "title": "of the title"}, {"path": "gone.mp4", "caption": 3}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"source={table}", *FAST]
    assert main([*words, f"out={tmp_path / 'required'}"]) == 1
    for captions, expected in (("empty", ""), ("title", "of the title")):
        out = tmp_path / captions
        assert main([*words, f"out={out}", f"captions={captions}"]) == 0
        assert [s.caption for s in read_samples(out)] == [expected]
    with pytest.raises(DataError, match=r"captions: there is no column 'titel', found path, caption, title; did"):
        main([*words, f"out={tmp_path / 'none'}", "captions=titel"])
