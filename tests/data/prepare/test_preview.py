"""`preview=` and `dry_run=true`: what a command would make, before it makes anything."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av.error
import numpy as np
import pytest
import torch
from PIL import Image

from data.encoders.pixels import PixelEncoder
from data.errors import DataError
from data.prepare import preview, surveying
from data.prepare.__main__ import main
from data.prepare.surveying import Job, Survey, survey_all, with_pictures
from data.prepare.video import read_clips
from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from data.sheet import LABEL, PICTURE
from tests.helpers.prepared import FAST, write_clips
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
    assert abs(gigabytes - written) < 0.02 * written
    assert "in a trial 7 clips took" in shown


@pytest.mark.parametrize(("limit", "tried", "rate", "told"), [
    (60.0, 7, 0.1, r"7 clips took 1\.\d s, 0\.5 of them the first, which does not count"),
    (0.55, 2, 0.1, r"2 clips took 0\.[67] s, 0\.5 of them the first, which does not count"),
    (0.3, 1, 0.5, r"1 clip took 0\.5 s"),
])  # fmt: skip
def test_the_trial_encodes_clips_for_a_minute(
    tmp_path: Path,
    films: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: float,
    tried: int,
    rate: float,
    told: str,
) -> None:
    """The first of each video, then the second ones; the hours are those of all clips at the rate behind the first."""
    encode, seen = PixelEncoder.encode, list[torch.Tensor]()

    def slow(self: PixelEncoder, frames: np.ndarray) -> torch.Tensor:
        time.sleep(0.1 if seen else 0.5)
        seen.append(encode(self, frames))
        return seen[-1]

    out, words = tmp_path / "out", [f"source={films}", f"out={tmp_path / 'out'}", *WORDS, "cuts=keep"]
    with monkeypatch.context() as patch:
        patch.setattr(PixelEncoder, "encode", slow)
        patch.setattr(preview, "TRIAL", limit)
        assert main([*words, f"preview={tmp_path / 'sheet.png'}"]) == 0
    found = re.search(r"([\d.e-]+) hours of encoding .* \(in a trial (.*);", capsys.readouterr().out)
    assert found is not None and re.fullmatch(told, found[2])
    assert 0.95 * rate < float(found[1]) * 3600 / 7 < 1.3 * rate
    assert main(words) == 0
    clips = {(sample.meta["source"], sample.meta["clip_start"]): sample.latent for sample in read_samples(out)}
    places = [(name, start) for start in (0.0, 0.625, 1.25) for name in ("a_cut.mp4", "b_still.mp4", "c_slow.mp4")]
    assert len(seen) == tried
    for place, latent in zip(places, seen, strict=False):
        assert torch.equal(latent, clips[place]), place


def test_a_clip_that_cannot_be_decoded_once_more_costs_the_hours_alone(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Videos are looked at by processes of their own, so that what fails here is the trial."""

    def gone(*_: object, **__: object) -> None:
        raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")

    monkeypatch.setattr(preview, "read_clips", gone)
    main([f"source={films}", f"out={tmp_path / 'out'}", *WORDS, f"preview={tmp_path / 'sheet.png'}"])
    printed = capsys.readouterr().out
    assert re.search(r"no estimate of gigabytes and of hours of encoding: .*a_cut.mp4: .*Invalid data", printed), (
        printed
    )
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(("error", "told"), [
    (torch.OutOfMemoryError("no room. Tried 9 GiB"), r"do not fit .* memory \(no room\); give a device="),
    (RuntimeError("the device\nis gone"), r"the device is gone"),
])  # fmt: skip
def test_a_trial_that_fails_comes_after_the_rest(
    tmp_path: Path,
    films: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    told: str,
) -> None:
    """Before it everything else is printed, and the sheet lies there."""
    png, before = tmp_path / "sheet.png", list[str]()

    def fails(*_: object) -> torch.Tensor:
        assert png.is_file()
        before.append(capsys.readouterr().out)
        raise error

    monkeypatch.setattr(PixelEncoder, "encode", fails)
    assert main([f"source={films}", f"out={tmp_path / 'out'}", *WORDS, f"preview={png}", "--dry-run"]) == 0
    assert all(
        part in before[0] for part in ("3 videos chosen", "estimate: 7 clips", "left out: 1 shots", "sheet.png:")
    )
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"no estimate of gigabytes and of hours of encoding: .*{told}.*", line)


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


def test_bad_files_are_named_and_a_sheet_that_is_not_drawn(
    tmp_path: Path, films: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those whose headers are bad and those that end too early, three of them, whether or not any clip is left."""
    png = tmp_path / "sheet.png"
    words = [f"source={films}", f"out={tmp_path / 'out'}", *WORDS, f"preview={png}"]
    (films / "c_slow.txt").unlink()
    whole = write_clips(films, 6, 60, options={"g": "10"}, container={"movflags": "faststart"})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "bad: c_slow.mp4: no caption, expected c_slow.txt beside it\nbad: v6.mp4: " in shown
    assert "more\n" not in shown and png.is_file()

    png.unlink()
    for name in ("a_cut", "b_still", "c_slow", "v6"):
        (films / f"{name}.mp4").write_bytes(b"no video")
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("bad: ") == 4 and "bad: a_cut.mp4: " in shown and "bad: 1 more\n" in shown
    assert f"{png}: not drawn, as no video that was looked at has a clip\n" in shown and not png.exists()


def test_pictures_are_held_of_the_sheets_rows_alone(films: Path) -> None:
    """One of each part of the videos, the first that has any, in whichever order they are ready."""
    made: list[weakref.ref[np.ndarray]] = []

    def ready(rows: list[int]) -> Iterator[tuple[int, Survey]]:
        for row in rows:
            frame = np.zeros((2, 2, 3), np.uint8)
            made.append(weakref.ref(frame))
            looked = Survey(pictures=[] if row == 0 else [frame])
            del frame
            yield row, looked
            del looked
            assert sum(kept() is not None for kept in made) <= 5

    for rows in (list(range(40)), list(range(39, -1, -1))):
        made.clear()
        surveys = with_pictures(ready(rows), range(40), 4)
        assert list(surveys) == list(range(40))
        assert [row for row, found in surveys.items() if found.pictures] == [1, 10, 20, 30]

    options = {"fps": 16, "frames": 10, "sizes": [(HEIGHT, WIDTH)]}
    for drawn in (True, False):
        jobs = [Job(7, films / "b_still.mp4", options, None, drawn)]
        ((row, found),) = survey_all(jobs, 1)
        assert row == 7 and len(found.taken) == 2 and bool(found.pictures) == drawn


def dying(path: Path, **options: Any) -> Any:
    """`read_clips` in a process that dies at the second video, as a crash in native code would."""
    if path.stem == "b_still":
        os.kill(os.getpid(), signal.SIGKILL)
    return read_clips(path, **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_dies_takes_one_video_with_it(
    tmp_path: Path, films: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    fork = multiprocessing.get_context("fork")  # which needs not import a test module
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setattr(surveying, "read_clips", dying)
    words = [f"source={films}", f"out={tmp_path / 'out'}", *WORDS[:-1], f"workers={workers}", "--dry-run"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "3 looked at: 5 clips, 1 pieces left out, 1 bad files" in shown
    assert "bad: b_still.mp4: the process that decodes it died: FFmpeg crashed, or memory ran out\n" in shown
    assert not multiprocessing.active_children()


def test_a_sheet_that_cannot_be_written_is_refused_first(tmp_path: Path, films: Path) -> None:
    with pytest.raises(DataError, match=r"gone/sheet.png, expected the name of a .png in a folder that is there"):
        main([f"source={films}", f"out={tmp_path / 'out'}", *WORDS, f"preview={tmp_path / 'gone' / 'sheet.png'}"])
