"""Commands and ranks of `python -m data.prepare` that meet in one folder, with locks and without."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.prepare import run, underway
from data.prepare.__main__ import main
from data.prepare.chosen import ChosenVideos
from data.shards.manifest import FILE
from tests.helpers.filesystems import no_locks
from tests.helpers.prepared import FAST, LENGTHS, check_complete, write_clips


@pytest.fixture
def words(tmp_path: Path, videos: Path) -> list[str]:
    return [f"source={videos}", f"out={tmp_path / 'out'}", *FAST]


def once(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, before: Any) -> None:
    """The first call of a module's function does `before` first."""
    action = getattr(module, name)

    def first(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(module, name, action)
        before()
        return action(*arguments, **more)

    monkeypatch.setattr(module, name, first)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), (rank, world, rank), strict=True):
        monkeypatch.setenv(name, str(value))


def test_a_command_whose_videos_were_replaced_while_it_loaded_its_weights_stops(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would number its clips by one list, and the folder's manifest would have the other."""
    out = tmp_path / "out"

    def another() -> None:
        with monkeypatch.context() as stopped, pytest.raises(RuntimeError, match="killed"):
            stopped.setattr(run, "encoder_of", killed)
            main([*words, "clips=1"])

    def killed(*arguments: Any) -> None:
        raise RuntimeError("killed")

    once(monkeypatch, run, "encoder_of", another)
    with pytest.raises(DataError, match=r"out: was begun with clips=1 \(asked: None\)"):
        main(words)
    chosen = ChosenVideos.load(out / ".prepare")
    assert chosen is not None and chosen.arguments["clips"] == 1 and not list(out.glob("shard-*"))

    def same_arguments_of_a_longer_list() -> None:
        another()
        write_clips(tmp_path / "videos", 6, 20)
        with monkeypatch.context() as stopped, pytest.raises(RuntimeError, match="killed"):
            stopped.setattr(run, "encoder_of", killed)
            main(words)

    once(monkeypatch, run, "encoder_of", same_arguments_of_a_longer_list)
    with pytest.raises(DataError, match=r"another data.prepare has chosen other videos for it since this one"):
        main(words)
    assert main(words) == 0
    check_complete(out, {**LENGTHS, "v6.mp4": 2})


def test_a_late_rank_leaves_a_reopened_folder_alone_without_locks(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks compare the finished folder with the list; one appends while the other still compares."""
    out = tmp_path / "out"
    monkeypatch.setattr(fcntl, "flock", no_locks(errno.ENOSYS))
    assert main(words) == 0
    write_clips(tmp_path / "videos", 6, 20)
    live: dict[str, bytes] = {}

    def appends() -> None:
        with monkeypatch.context() as paused:
            as_rank(paused, 1, 2)
            assert main(words) == 0  # the added video is left to rank 0
        live.update({path.name: path.read_bytes() for path in (out / ".prepare").iterdir()})
        assert not (out / FILE).exists()
        once(monkeypatch, run, "encoder_of", lambda: check_live(out, live))

    once(monkeypatch, underway, "reopen", appends)
    as_rank(monkeypatch, 0, 2)
    assert main(words) == 0
    check_complete(out, {**LENGTHS, "v6.mp4": 2})


def check_live(out: Path, live: dict[str, bytes]) -> None:
    """All that the first rank had in its journal is there."""
    assert live and "rank-001.lock" in live
    assert {path.name: path.read_bytes() for path in (out / ".prepare").iterdir()} == live


def test_a_late_rank_takes_no_manifest_that_others_made_meanwhile(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They appended and finished while it compared: what they appended stays."""
    out = tmp_path / "out"
    monkeypatch.setattr(fcntl, "flock", no_locks(errno.ENOSYS))
    assert main(words) == 0
    write_clips(tmp_path / "videos", 6, 20)

    def appends() -> None:
        assert main(words) == 0

    once(monkeypatch, underway, "reopen", appends)
    assert main(words) == 0
    check_complete(out, {**LENGTHS, "v6.mp4": 2})


def test_a_rank_that_finds_the_folder_reopened_goes_on_with_it(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest that ended its planning has gone before it is read."""
    out = tmp_path / "out"
    assert main(words) == 0
    write_clips(tmp_path / "videos", 6, 20)
    check_open = underway.check_open

    def reopened(folder: Path) -> None:
        try:
            check_open(folder)
        finally:
            monkeypatch.setattr(underway, "check_open", check_open)
            with monkeypatch.context() as stopped, pytest.raises(RuntimeError, match="killed"):
                stopped.setattr(run, "encoder_of", killed)
                main(words)
            assert not (out / FILE).exists()

    def killed(*arguments: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(underway, "check_open", reopened)
    assert main(words) == 0
    check_complete(out, {**LENGTHS, "v6.mp4": 2})


def test_a_finished_folder_outlives_its_videos(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, videos = tmp_path / "out", tmp_path / "videos"
    assert main(words) == 0
    for path in videos.iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "13 clips in 1 shards, already there; it was not compared with the list of videos, as" in shown
    assert "no videos in this folder" in shown
    videos.rmdir()
    assert main(words) == 0
    check_complete(out)


def test_a_finished_folder_may_be_read_only(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is made in it; what cannot be appended there is refused."""
    out, access = tmp_path / "out", os.access
    assert main(words) == 0

    def refuses(path: Any, mode: int, **more: Any) -> bool:
        return access(path, mode, **more) and not (Path(path) == out and mode & os.W_OK)

    def read_only(*arguments: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "access", refuses)
    monkeypatch.setattr(underway, "exclusively", read_only)
    before = {path.name: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    capsys.readouterr()
    assert main(words) == 0
    assert "13 clips in 1 shards, already there" in capsys.readouterr().out
    write_clips(tmp_path / "videos", 6, 20)
    with pytest.raises(DataError, match=r"already there, but 1 video \(v6.mp4\) was added to the list and it is read"):
        main(words)
    assert {path.name: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == before
