"""`preview=` and `dry_run=true`: what a command would make, before it makes anything."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import DataError
from data.prepare.__main__ import main
from data.shards.manifest import Manifest
from data.sheet import LABEL, PICTURE
from tests.helpers.prepared import FAST
from tests.helpers.scenes import HEIGHT, WIDTH, barred, cut_together, held, pan, still

WORDS = [*FAST[:2], f"size={HEIGHT}x{WIDTH}", "workers=1"]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Three videos: two shots, a still scene, and one between bars with every frame twice."""
    for name, parts in {
        "a_cut": [(pan(0, 2), 20), (pan(1, 2), 5), (pan(2, 2), 10)],
        "b_still": [(still(3), 20)],
        "c_slow": [(barred(held(pan(4, 4), 2), 16), 20)],
    }.items():
        cut_together(tmp_path / "videos" / f"{name}.mp4", parts, caption=f"caption of {name}")
    return tmp_path / "videos"


def test_a_sheet_and_an_estimate(tmp_path: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pictures are the clips' first, middle and last frames; the estimate is what comes of the command."""
    out, png = tmp_path / "out", tmp_path / "sheet.png"
    words = [f"source={films}", f"out={out}", *WORDS]
    assert main([*words, f"preview={png}"]) == 0
    assert not out.exists()
    shown = capsys.readouterr().out
    assert "3 videos chosen, 0 do not qualify, 0 files are bad; 3 looked at: 7 clips, 1 pieces left out, 0 bad" in shown
    sheet = np.asarray(Image.open(png), float)
    height = round(HEIGHT * PICTURE / WIDTH) + LABEL
    assert sheet.shape == (3 * height, 3 * (PICTURE + 2), 3)
    for row, scene in enumerate((pan(0, 2), still(3))):
        for column, frame in enumerate((0, 4, 9)):
            left, top = column * (PICTURE + 2), row * height + LABEL
            picture = sheet[top : top + height - LABEL, left : left + PICTURE]
            expected = Image.fromarray(scene(frame)).resize((PICTURE, height - LABEL))
            assert np.abs(picture - np.asarray(expected, float)).mean() < 8
        assert (sheet[row * height : row * height + LABEL] < 128).any(), "a line of text"
    clips, hours = re.search(r"estimate: (?:about )?(\d+) clips of 10 frames, ([\d.]+) hours", shown).groups()  # type: ignore[union-attr]
    gigabytes = float(re.search(r"estimate: ([\d.e-]+) GB of shards", shown)[1])  # type: ignore[index]
    assert main(words) == 0
    manifest = Manifest.load(out)
    assert int(clips) == len(manifest.samples) == 7 and float(hours) == round(7 * 10 / 16 / 3600, 2)
    written = sum(sample.bytes for sample in manifest.samples) / 1e9
    assert abs(gigabytes - written) < 0.1 * written


def test_a_dry_run_shows_what_each_filter_leaves_out(
    tmp_path: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source={films}", f"out={tmp_path / 'out'}", *WORDS]
    assert main([*words, "--dry-run", "min_motion=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "left out: 1 shots between cuts are shorter than a clip, such as a_cut.mp4 at 1.25 s" in shown
    assert "left out: 2 clips do not move, such as b_still.mp4 at 0.00 s, b_still.mp4 at 0.62 s" in shown
    assert "1 videos have black bars, such as c_slow.mp4; bars=crop or bars=drop" in shown
    assert re.search(
        r"motion: .* of 7 clips, .* leave out: min_motion=0.1 \d, min_motion=0.3 \d, min_motion=0.5 2", shown
    )
    assert re.search(r"repeated: .* max_repeated=0.1 4, max_repeated=0.25 4, max_repeated=0.5 \d", shown)
    assert not (tmp_path / "out").exists()


def test_a_sheet_that_cannot_be_written_is_refused_first(tmp_path: Path, films: Path) -> None:
    with pytest.raises(DataError, match=r"gone/sheet.png, expected the name of a .png in a folder that is there"):
        main([f"source={films}", f"out={tmp_path / 'out'}", *WORDS, f"preview={tmp_path / 'gone' / 'sheet.png'}"])
