"""Cuts of films with fades, a dissolve and titles, beside those of `test_footage.py`: as a person sees them.

The films lie in packages that are no dependency, whose names follow. They are looked for in the folder that
RADIAL_LORA_FOOTAGE names, and in radial-lora/footage of the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import av
import pytest

from data.prepare.clip_rules import Rules, SmallPictures
from data.prepare.shots import Cuts
from data.prepare.video import Clip, read_clips

PLACES = [
    *([Path(os.environ["RADIAL_LORA_FOOTAGE"])] if "RADIAL_LORA_FOOTAGE" in os.environ else []),
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "radial-lora" / "footage",
]


@dataclass(frozen=True)
class Film:
    """A film and what is in it; frames are counted from 0.

    Attributes:
        package: that has it.
        digest: the beginning of its sha256.
        cuts: frames that begin a shot.
        fades: black frame behind which a picture comes back, and the frame in which it is plainly there.
        missed: frames that begin a shot and are not found.
    """

    package: str
    digest: str
    frames: int
    cuts: tuple[int, ...] = ()
    fades: tuple[tuple[int, int], ...] = ()
    missed: tuple[int, ...] = ()


MOVIEPY = "PyPI's moviepy 2.2.1 (source)"
GRADIO, OPENCV = "PyPI's gradio 6.31.0", "Debian's opencv-doc 4.6.0"
FILMS = {
    # the film begins with a fade; at 1122 to 1133 one shot dissolves into another; at 1252 words appear on black
    "trailer_bbb.mp4": Film(
        MOVIEPY,
        "ce0d2ba68822",
        1323,
        (593, 864, 900, 988, 1049),
        ((0, 6), (240, 245), (336, 342), (768, 773)),
        (1128, 1252),
    ),
    "Megamind.avi": Film(OPENCV, "0057387cb7e7", 270, (98, 154, 200), ((0, 1),)),
    "vtest.avi": Film(OPENCV, "45cddc9490be", 795),
    "a.mp4": Film(GRADIO, "a6f96e13dfd6", 209),  # ends in black
    "world.mp4": Film(GRADIO, "71944d7430c4", 901),
}


@pytest.fixture(params=FILMS)
def film(request: pytest.FixtureRequest) -> tuple[Path, Film]:
    """The file and what is known of it."""
    name: str = request.param
    known = FILMS[name]
    for place in PLACES:
        for path in place.rglob(name):
            if hashlib.sha256(path.read_bytes()).hexdigest().startswith(known.digest):
                return path, known
    pytest.skip(f"{name} of {known.package} is not in {' or '.join(map(str, PLACES))} (RADIAL_LORA_FOOTAGE)")


def cuts_of(path: Path) -> tuple[list[int], int, float]:
    """Frames that begin a shot by `Cuts`, how many frames there are, and how many a second."""
    picture = SmallPictures()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate is not None
        judged = Cuts(Rules().cut_threshold)((frame, picture(frame)) for frame in container.decode(stream))
        begins = [cut for _, _, cut in judged]
        return [n for n, cut in enumerate(begins) if cut], len(begins), float(stream.average_rate)


@pytest.mark.slow
def test_the_cuts_that_a_person_sees(film: tuple[Path, Film]) -> None:
    path, known = film
    found, frames, fps = cuts_of(path)
    assert frames == known.frames
    in_fades = [[n for n in found if black < n <= there] for black, there in known.fades]
    assert [len(inside) for inside in in_fades] == [1] * len(known.fades), "each fade is found once"
    assert sorted({*found} - {n for inside in in_fades for n in inside}) == [*known.cuts]
    assert not {*found} & {*known.missed}, "one more is found: the table of data/README.md has to say so"
    clips = list(read_clips(path, fps=fps, frames=16, sizes=[(64, 96)], rules=Rules(cuts="split")))
    starts = [round(clip.start * fps) for clip in clips if isinstance(clip, Clip)]
    assert len(starts) >= len(known.cuts)
    assert not [(start, cut) for start in starts for cut in known.cuts if start < cut < start + 16]
