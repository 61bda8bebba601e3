"""A window over more shards than a process may have files open."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.errors import DataError
from data.shards import reader
from data.shards.batch import Batch
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.stream import LatentStream
from tests.helpers.batches import assert_equal

SHARDS = 80


@pytest.fixture
def many(make_folder: Any) -> Manifest:
    """Two samples in each of 80 shards."""
    made: Manifest = make_folder(2 * SHARDS, per_shard=2)
    return made


@contextlib.contextmanager
def only(number: int) -> Iterator[None]:
    """So many files beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = set(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    limit = next(n for n in itertools.count() if len(set(range(n)) - taken) == number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def batches_of(manifest: Manifest, **more: Any) -> list[Batch]:
    """An epoch whose shuffle window is all of it, so that every shard is wanted to the end."""
    order = BatchOrder(manifest.shapes(), seed=1, global_batch=4, shuffle_window=2 * SHARDS)
    return list(LatentStream(manifest, order, num_steps=SHARDS // 2, **more))


@pytest.mark.parametrize("kind", ["local", "cache"])
def test_the_least_recently_read_are_closed(
    many: Manifest, tmp_path: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = batches_of(many)
    monkeypatch.setattr(reader, "MOST_OPEN", 10)
    far = many if kind == "local" else Manifest.load(f"pipe:cat {many.folder}/{{}}")
    more = {} if kind == "local" else {"cache": tmp_path / "cache"}
    with only(40):
        assert_equal(batches_of(far, workers=2, **more), expected)
    assert not waits


def test_readers_of_many_workers_stay_below_the_usual_limit() -> None:
    assert reader.MOST_OPEN * 16 < 1024


def test_too_many_files_are_no_fault_of_the_network(many: Manifest, waits: list[float]) -> None:
    """Shards that can only be read through stay open: what to do is told at once."""
    far = Manifest.load(f"pipe:cat {many.folder}/{{}}")
    with only(30), pytest.raises(DataError, match=r"files open and has them all: raise ulimit -n, or give a cache"):
        batches_of(far)
    assert not waits
