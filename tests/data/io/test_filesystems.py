"""Where folders cannot be synced or files cannot be locked, work goes on, and says once what follows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data.io import files, locks
from data.io.files import can_sync, sync_folder, write_bytes
from data.io.locks import Lock, has_locks, take
from data.prepare.__main__ import main as prepare
from data.shards.manifest import Manifest
from data.shards.stream import LatentStream
from tests.helpers import HELPERS
from tests.helpers.batches import assert_equal, order_of
from tests.helpers.filesystems import NO_LOCKS, NO_SYNC, no_locks, no_sync
from tests.helpers.prepared import FAST, LENGTHS, check_complete


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "warned", set())
    monkeypatch.setattr(locks, "warned", set())


@pytest.mark.parametrize("number", NO_SYNC)
def test_a_folder_that_cannot_be_synced_is_told_once(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    assert can_sync(tmp_path)
    monkeypatch.setattr(os, "fsync", no_sync(number))
    assert not can_sync(tmp_path)
    write_bytes(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert len(make_folder(7).samples) == 7
    (said,) = caplog.messages
    assert said == f"{tmp_path}: its file system syncs no folders; a power cut may lose what was last renamed"


def test_another_failure_to_sync_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_sync(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)


@pytest.mark.parametrize("number", NO_LOCKS)
def test_no_locks_are_not_a_held_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    with (tmp_path / "lock").open("w", encoding="utf-8") as one, (tmp_path / "lock").open(encoding="utf-8") as other:
        assert take(one) is Lock.OURS
        assert take(other) is take(other, shared=True) is take(other, seconds=0.1) is Lock.HELD
        assert has_locks(tmp_path)
        monkeypatch.setattr("fcntl.flock", no_locks(number))
        assert take(other) is take(other, wait=True) is Lock.NONE
        assert not has_locks(tmp_path)
        monkeypatch.setattr("fcntl.flock", no_locks(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            take(other)


def test_a_cache_without_locks(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each worker fetches what it needs, under a name of its own."""
    expected = list(LatentStream(manifest, order_of(manifest), num_steps=8))
    monkeypatch.setattr("fcntl.flock", no_locks(errno.ENOLCK))
    far = Manifest.load(f"pipe:cat {manifest.folder}/{{}}")
    cache = tmp_path / "cache"
    assert_equal(list(LatentStream(far, order_of(far), num_steps=8, workers=3, cache=cache)), expected)
    assert {path.stem for path in cache.glob("*.tar")} == {shard.sha256 for shard in manifest.shards}
    assert not list(cache.glob(".*.tmp"))
    assert sum("has no locks" in message for message in caplog.messages) == 1


def test_preparing_without_locks_and_syncs(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks(errno.ENOSYS))
    monkeypatch.setattr(os, "fsync", no_sync(errno.EINVAL))
    out = tmp_path / "out"
    assert prepare([f"source={videos}", f"out={out}", *FAST]) == 0
    assert len(check_complete(out)) == sum(LENGTHS.values())
    assert sum("another data.prepare that writes into it would go unnoticed" in said for said in caplog.messages) == 1


@pytest.mark.slow
def test_ranks_that_cannot_wait_for_each_other_make_one_folder(tmp_path: Path, videos: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, HELPERS / "filesystems.py", "data.prepare", f"source={videos}"]

    def rank(number: int) -> subprocess.CompletedProcess[str]:
        own = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
        return subprocess.run(
            [*words, f"out={out}", *FAST], env={**os.environ, **own}, capture_output=True, encoding="utf-8"
        )

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(rank, range(2)))
    assert [done.returncode for done in ended] == [0, 0], ended
    assert len(check_complete(out)) == sum(LENGTHS.values())
