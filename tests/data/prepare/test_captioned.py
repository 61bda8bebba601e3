"""`caption.model=`: data.prepare writes the captions that are missing, and makes shards of the videos with them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data import caption
from data.errors import DataError
from data.prepare.__main__ import main
from data.shards.stream import read_samples
from tests.helpers.prepared import FAST, LENGTHS, command, write_clips
from tests.helpers.tiny_models import save_llava


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def silent(videos: Path) -> Path:
    """The six videos, of which only the first has a caption."""
    for path in videos.glob("v[1-5].txt"):
        path.unlink()
    return videos


def texts(folder: Path) -> dict[str, str]:
    """The captions that lie beside the videos of a folder."""
    return {f"{path.stem}.mp4": path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")}


def check_captions(out: Path, expected: dict[str, str]) -> None:
    """Every clip of the six videos is there, with these captions."""
    found = [(sample.meta["source"], sample.caption) for sample in read_samples(out)]
    assert sorted(found) == sorted((name, expected[name]) for name, count in LENGTHS.items() for _ in range(count))


def test_a_kill_while_captions_are_written_costs_none_of_them(tmp_path: Path, silent: Path, model: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(silent, alone)
    assert caption.main([str(alone), f"model={model}"]) == 0
    expected = texts(alone)
    assert len(expected) == 6 and expected["v0.mp4"] == "clip of video 0" and all(expected.values())

    out = tmp_path / "out"
    words = [f"source={silent}", f"out={out}", f"caption.model={model}", *FAST]
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(texts(silent)) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = {path: path.stat().st_mtime_ns for path in silent.glob("*.txt")}
    assert 3 <= len(written) < 6 and not list(out.glob("shard-*"))
    assert main(words) == 0
    assert texts(silent) == expected
    assert {path: path.stat().st_mtime_ns for path in written} == written
    check_captions(out, expected)


def test_the_rank_that_chooses_describes_all(
    tmp_path: Path, silent: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is added to a finished folder is described too; a video that cannot be is a bad file."""
    out = tmp_path / "out"
    words = [f"source={silent}", f"out={out}", f"caption.model={model}", *FAST, "bad_share=1"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank in ("1", "0"):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert main(words) == 0
        assert len(texts(silent)) == 6
    check_captions(out, texts(silent))
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    write_clips(silent, 6, 20).with_suffix(".txt").unlink()
    (silent / "v7.mp4").write_bytes(b"no video")
    assert main(words) == 0
    found = {sample.meta["source"]: sample.caption for sample in read_samples(out)}
    assert found["v6.mp4"] == texts(silent)["v6.mp4"] and "v7.mp4" not in found
    assert "v7.mp4" in (out / "rejected.jsonl").read_text(encoding="utf-8")


def test_a_look_counts_what_will_be_described_and_writes_nothing(
    tmp_path: Path, silent: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source={silent}", f"out={tmp_path / 'out'}", *FAST, "dry_run=true"]
    assert main([*words, f"caption.model={model}"]) == 0
    shown = capsys.readouterr().out
    assert "6 videos chosen" in shown and "estimate: 13 clips" in shown
    assert len(texts(silent)) == 1
    assert main(words) == 0 and "1 videos chosen" in capsys.readouterr().out


def test_what_cannot_be_described_is_refused(tmp_path: Path, silent: Path, model: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,caption\nv0.mp4,\n", encoding="utf-8")
    words = [f"source={silent}", f"out={tmp_path / 'out'}", *FAST]
    for more, message in [
        ([f"source={table}", *words[1:], f"caption.model={model}"], r"list.csv: expected a folder of videos without"),
        (
            [*words, f"caption.model={model}", "captions=empty"],
            r"captions is empty, but caption.model writes what is missing",
        ),
        ([*words, f"caption.model={tmp_path / 'gone'}"], r"gone: no such folder; download the caption model"),
    ]:
        with pytest.raises(DataError, match=message):
            main(more)
    assert {path.name for path in tmp_path.iterdir()} == {"videos", "list.csv"}


def test_a_source_that_is_not_there_is_answered_as_without_the_model(
    tmp_path: Path, videos: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished folder needs it no more; else it was mistyped."""
    out = tmp_path / "out"
    words = [f"source={videos}", f"out={out}", *FAST]
    assert main([*words, f"caption.model={model}"]) == 0
    shutil.rmtree(videos)
    capsys.readouterr()
    for more in ([], [f"caption.model={model}"]):
        assert main([*words, *more]) == 0
        assert f"already there; it was not compared with the list of videos, as {videos} is gone" in (
            capsys.readouterr().out
        )
        for asked in ([], [f"preview={tmp_path / 'sheet.png'}"]):
            with pytest.raises(DataError, match=r"videos: no such folder or table; correct source="):
                main([words[0], f"out={tmp_path / 'other'}", *FAST, *more, *asked])
    assert not (tmp_path / "other").exists()
