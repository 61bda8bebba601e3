"""Clips and cuts: rendered scenes cut together at known places, and scenes that only seem to have a cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.prepare.clip_places import Passed
from data.prepare.clip_rules import Rules
from data.prepare.video import Clip, read_clips
from tests.helpers.scenes import HEIGHT, WIDTH, Scene, cut_together, lit, pan, still


def lay(path: Path, frames: int, **rules: object) -> tuple[list[Clip], list[Passed]]:
    chosen = Rules(**rules)  # type: ignore[arg-type]
    found = list(read_clips(path, fps=16, frames=frames, sizes=[(HEIGHT, WIDTH)], rules=chosen))
    return [e for e in found if isinstance(e, Clip)], [e for e in found if isinstance(e, Passed)]


def starts(clips: list[Clip]) -> list[float]:
    """Of clips, in frames."""
    return [clip.start * 16 for clip in clips]


@pytest.mark.parametrize("speed", [0, 1, 12])
def test_clips_begin_anew_at_each_cut(tmp_path: Path, speed: float) -> None:
    lengths = [20, 21, 9, 33, 12, 5, 24]
    path = cut_together(tmp_path / "v.mp4", [(pan(seed, speed), count) for seed, count in enumerate(lengths)])
    clips, passed = lay(path, 10, cuts="split")
    shots = np.cumsum([0, *lengths])[:-1]
    expected = [int(shot) + 10 * k for shot, count in zip(shots, lengths, strict=True) for k in range(count // 10)]
    assert starts(clips) == expected and [clip.index for clip in clips] == list(range(len(expected)))
    assert [(p.start * 16, p.why) for p in passed] == [(shots[2], "short"), (shots[5], "short")]
    for clip in clips:
        shot = int(np.searchsorted(shots, clip.start * 16, "right")) - 1
        first = int(clip.start * 16 - shots[shot])
        for k, frame in enumerate(clip.frames):  # each frame is the one that was rendered there
            assert np.abs(frame.astype(float) - pan(shot, speed)(first + k)).mean() < 8
    dropped, passed = lay(path, 10, cuts="drop")
    whole = [k for k in range(0, sum(lengths) - 9, 10) if not any(k < shot < k + 10 for shot in shots)]
    assert starts(dropped) == whole and {p.why for p in passed} == {"cut"}
    assert sorted([*starts(dropped), *(p.start * 16 for p in passed)]) == list(range(0, sum(lengths) - 9, 10))
    kept, passed = lay(path, 10)
    assert starts(kept) == list(range(0, sum(lengths) - 9, 10)) and not passed


def flash(k: int) -> float:
    return 2.5 if k in (30, 31, 50) else 0.7


UNCUT: dict[str, Scene] = {
    "fast camera": pan(1, 24),
    "faster camera": pan(1, 60),
    "dawn": lit(pan(2, 1), lambda k: 0.3 + k / 60),
    "flashes": lit(pan(2, 1), flash),
    "lamp": lit(pan(2, 1), lambda k: 1.3 if k >= 40 else 0.6),
    "flicker": lit(still(3), lambda k: 1.0 + 0.3 * (k % 3)),
    "still": still(4),
}


@pytest.mark.parametrize("name", UNCUT)
def test_speed_and_light_are_no_cuts(tmp_path: Path, name: str) -> None:
    clips, passed = lay(cut_together(tmp_path / "v.mp4", [(UNCUT[name], 80)]), 80, cuts="split")
    assert starts(clips) == [0] and not passed


def test_no_clip_crosses_a_fade(tmp_path: Path) -> None:
    """Out to black and in again; and one scene straight to black, in which the next one begins slowly."""
    out = lit(pan(3, 1), lambda k: min(1.0, max(0.0, (30 - k) / 10)))
    path = cut_together(tmp_path / "v.mp4", [(out, 36), (lit(pan(4, 1), lambda k: min(1.0, k / 10)), 40)])
    clips, passed = lay(path, 8, cuts="split")
    assert starts(clips) == [0, 8, 16, 37, 45, 53, 61]
    assert [(p.start * 16, p.why) for p in passed] == [(30, "short")], "the black part"


def test_the_first_frames_are_judged_too(tmp_path: Path) -> None:
    """A piece of a long video may begin a frame before a cut, and the detector compares with two before."""
    for first in (1, 2):
        path = cut_together(tmp_path / "v.mp4", [(pan(0, 1), first), (pan(1, 1), 30)])
        clips, passed = lay(path, 10, cuts="split")
        assert starts(clips) == [first, first + 10, first + 20]
        assert [(p.start, p.why) for p in passed] == [(0, "short")]


def test_the_last_frames_are_judged_too(tmp_path: Path) -> None:
    """A detector that looks ahead has nothing behind them to compare with."""
    path = cut_together(tmp_path / "v.mp4", [(pan(0, 1), 29), (pan(1, 1), 1)])
    clips, passed = lay(path, 10, cuts="split")
    assert starts(clips) == [0, 10] and [(p.start * 16, p.why) for p in passed] == [(29, "short")]


def test_a_run_that_goes_on_numbers_clips_as_before(tmp_path: Path) -> None:
    path = cut_together(tmp_path / "v.mp4", [(pan(seed, 1), 25) for seed in range(3)])
    rules = {"cuts": "split", "min_motion": 0.1}
    all_of_them, _ = lay(path, 10, **rules)
    rest = list(
        read_clips(path, fps=16, frames=10, sizes=[(HEIGHT, WIDTH)], skip={0, 2, 3}, rules=Rules(**rules))  # type: ignore[arg-type]
    )
    assert [(clip.index, clip.start) for clip in rest if isinstance(clip, Clip)] == [
        (clip.index, clip.start) for clip in all_of_them if clip.index not in (0, 2, 3)
    ]
