"""Clips that are left out for what they look like, and black bars."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.prepare.__main__ import main
from data.prepare.bars import WHOLE, find_bars
from data.prepare.clip_rules import Rules
from data.prepare.frames import opened
from data.prepare.video import Clip, Passed, read_clips
from data.shards.stream import read_samples
from radial.errors import Mistake
from tests.helpers.prepared import FAST
from tests.helpers.scenes import HEIGHT, WIDTH, Scene, barred, cut_together, held, lit, pan, still
from tests.helpers.videos import orient

DARK = lit(pan(5, 2), lambda k: 0.0)


@pytest.mark.parametrize(("rule", "scene", "why"), [
    ({"min_motion": 0.3}, still(1), "static"),
    ({"max_black": 0.5}, DARK, "black"),
    ({"max_repeated": 0.4}, held(pan(2, 3), 2), "repeated"),
])  # fmt: skip
def test_a_rule_leaves_out_what_it_is_for(tmp_path: Path, rule: dict[str, float], scene: Scene, why: str) -> None:
    """Of two clips, the one that moves, is lit and shows each frame once stays."""
    path = cut_together(tmp_path / "v.mp4", [(scene, 20), (pan(3, 2), 20)])
    first, second = read_clips(path, fps=16, frames=20, sizes=[(HEIGHT, WIDTH)], rules=Rules(**rule))  # type: ignore[arg-type]
    assert first == Passed(0.0, why)
    assert isinstance(second, Clip) and (second.index, second.start) == (0, 1.25)
    everything = list(read_clips(path, fps=16, frames=20, sizes=[(HEIGHT, WIDTH)]))
    assert [clip.index for clip in everything if isinstance(clip, Clip)] == [0, 1]


def test_frames_that_the_pace_repeats_are_repeated(tmp_path: Path) -> None:
    path = cut_together(tmp_path / "v.mp4", [(pan(3, 2), 20)], fps=8)
    events = read_clips(path, fps=16, frames=20, sizes=[(HEIGHT, WIDTH)], rules=Rules(max_repeated=0.5))
    assert list(events) == [Passed(0.0, "repeated"), Passed(1.25, "repeated")]


@pytest.mark.parametrize("sideways", [False, True])
def test_bars_are_cropped_to_the_picture_between_them(tmp_path: Path, sideways: bool) -> None:
    """A quarter turn later, too, where they stand at the sides."""
    scene = pan(6, 2)
    path = cut_together(tmp_path / "v.mp4", [(barred(scene, 16), 40)])
    box = find_bars(path)
    assert 16 / HEIGHT <= box.top <= 19 / HEIGHT and 77 / HEIGHT <= box.bottom <= 80 / HEIGHT
    assert (box.left, box.right) == (0, 1)
    if sideways:
        orient(path, (0, 1, -1, 0))
    size = (WIDTH, 60) if sideways else (60, WIDTH)
    rules = Rules(bars="crop")
    (clip,) = (c for c in read_clips(path, fps=16, frames=40, sizes=[size], rules=rules) if isinstance(c, Clip))
    expected = scene(7)[18:78]
    shown = np.rot90(clip.frames[7]) if sideways else clip.frames[7]
    assert np.abs(shown.astype(float) - expected).mean() < 4
    assert np.abs(np.roll(shown, 3, axis=0).astype(float) - expected).mean() > 6
    assert list(read_clips(path, fps=16, frames=40, sizes=[size], rules=Rules(bars="drop"))) == [Passed(0.0, "bars")]


def test_dark_and_whole_pictures_have_no_bars(tmp_path: Path) -> None:
    night = lit(pan(7, 1), lambda k: 0.02 if k < 20 else 1.0)
    for name, scene in {"whole": pan(8, 1), "black": DARK, "night": night}.items():
        assert find_bars(cut_together(tmp_path / f"{name}.mp4", [(scene, 40)], fps=16)) == WHOLE, name


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_a_title_on_black_before_the_first_key_frame_but_one_makes_no_bars(tmp_path: Path, name: str) -> None:
    """A clip of some seconds may have one key frame alone, whose picture is not all there is of it."""
    path = cut_together(tmp_path / name, [(barred(still(1), 40), 10), (pan(2, 1), 60)])
    with opened(path) as container:
        assert sum(frame.key_frame for frame in container.decode(video=0)) == 1
    assert find_bars(path) == WHOLE
    path = cut_together(tmp_path / name, [(barred(pan(1, 1), 16), 30), (barred(pan(2, 1), 16), 30)])
    assert find_bars(path) != WHOLE


def test_what_is_left_out_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, parts in {
        "cut": [(pan(0, 2), 25), (pan(1, 2), 6), (pan(2, 2), 12)],
        "still": [(still(3), 22)],
        "good": [(pan(4, 2), 20)],
    }.items():
        cut_together(tmp_path / "videos" / f"{name}.mp4", parts, caption=name)
    words = [f"source={tmp_path / 'videos'}", *FAST[:-1]]
    assert main([*words, "min_motion=0.3", f"out={tmp_path / 'out'}"]) == 0
    found = [(s.meta["source"], round(s.meta["clip_start"] * 16)) for s in read_samples(tmp_path / "out")]
    assert found == [("cut.mp4", 0), ("cut.mp4", 10), ("cut.mp4", 31), ("good.mp4", 0), ("good.mp4", 10)]
    shown = capsys.readouterr().out
    assert "5 clips in 1 shards from 3 videos, 0 bad files" in shown
    assert "left out: 1 shots between cuts are shorter than a clip" in shown
    assert "left out: 2 clips do not move" in shown
    with pytest.raises(DataError, match=r"was begun with cuts=split \(asked: keep\)"):
        main([*words, "min_motion=0.3", f"out={tmp_path / 'out'}", "cuts=keep"])
    assert main([*words, f"out={tmp_path / 'none'}", "max_black=0", "min_motion=200"]) == 1
    assert "no clip came out, of 3 videos; left out: 1 shots" in capsys.readouterr().err


def test_bounds_out_of_range_are_refused(tmp_path: Path) -> None:
    for word, message in (
        ("max_black=2", r"max_black is .*2.*from 0 to 1"),
        ("min_motion=-1", r"min_motion is .*-1.*from 0 to 255"),
        ("cuts=no", r"cuts is .*no.*split, drop"),
    ):
        with pytest.raises(Mistake, match=message):
            main([f"source={tmp_path}", f"out={tmp_path / 'out'}", word])
