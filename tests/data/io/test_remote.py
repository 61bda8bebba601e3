"""Shards behind a real HTTP server, commands and fsspec, with and without a cache."""

from __future__ import annotations

import email.utils
import hashlib
import re
import resource
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from data.errors import DataError
from data.io import retry as patience
from data.io.retry import check_wanted
from data.shards.batch import Batch
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.stream import LatentStream, Worker
from tests.helpers.batches import order_of
from tests.helpers.servers import Server

pytestmark = pytest.mark.usefixtures("waits")


def batches_of(manifest: Manifest, workers: int = 0, **more: Any) -> list[Batch]:
    order = BatchOrder(manifest.shapes(), seed=1, global_batch=4, shuffle_window=9)
    return list(LatentStream(manifest, order, workers=workers, **{"num_steps": 8, **more}))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert [(b.step, b.keys) for b in found] == [(b.step, b.keys) for b in expected]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_http_reads_ranges_of_what_is_wanted(manifest: Manifest, server: Server, workers: int) -> None:
    far = Manifest.load(server.url)
    assert far == manifest and far.urls[1] == f"{server.url}/shard-00001.tar"
    assert_equal(batches_of(far, workers), batches_of(manifest))
    prompt, expected = far.load_empty_prompt(), manifest.load_empty_prompt()
    assert torch.equal(prompt.text["umt5"].tokens, expected.text["umt5"].tokens)
    shards = [wanted for path, wanted in server.requests if path.endswith(".tar")]
    assert shards and all(wanted is not None for wanted in shards)


def test_resuming_over_http_fetches_no_payload_that_is_skipped(manifest: Manifest, server: Server) -> None:
    far = Manifest.load(server.url)
    server.sent = 0
    (batch,) = batches_of(far, start_step=1000, num_steps=1)
    sizes = {info.key: info.bytes for info in manifest.samples}
    probes = len(manifest.shards)
    assert server.sent <= sum(sizes[key] for key in batch.keys) + probes


@pytest.mark.parametrize("kind", ["server", "pipe"])
def test_what_cannot_seek_is_read_through_and_says_so(
    manifest: Manifest, server: Server, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges = False
    far = Manifest.load(server.url if kind == "server" else f"pipe:cat {manifest.folder}/{{}}")
    assert_equal(batches_of(far), batches_of(manifest))
    why = "does not answer ranges" if kind == "server" else "cannot be read from the middle"
    assert any("is read through" in message and why in message for message in caplog.messages)


def test_fsspec_urls(manifest: Manifest) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(manifest.folder), "/bucket/shards", recursive=True)
    far = Manifest.load("memory://bucket/shards")
    assert far == manifest
    assert_equal(batches_of(far), batches_of(manifest))
    with pytest.raises(DataError, match=r"nosuch://x/manifest.json: .*nosuch"):
        Manifest.load("nosuch://x")


@pytest.mark.parametrize("kind", ["http", "pipe"])
def test_a_cache_fetches_each_shard_once(tmp_path: Path, manifest: Manifest, server: Server, kind: str) -> None:
    far = Manifest.load(server.url if kind == "http" else f"pipe:cat {manifest.folder}/{{}}")
    cache = tmp_path / "cache"
    assert_equal(batches_of(far, workers=2, cache=cache), batches_of(manifest))
    assert sorted(path.stem for path in cache.glob("*.tar")) == sorted(shard.sha256 for shard in manifest.shards)
    fetched = [path for path, wanted in server.requests if path.endswith(".tar")]
    assert sorted(fetched) == (sorted(f"/{shard.file}" for shard in manifest.shards) if kind == "http" else [])
    for shard in manifest.shards:
        (manifest.folder / shard.file).unlink()
    assert len(batches_of(far, cache=cache)) == 8


def test_failures_of_the_way_are_tried_again_then_stop_the_run(
    manifest: Manifest, server: Server, waits: list[float]
) -> None:
    far = Manifest.load(server.url)
    for server.failure in (503, 429, 408):
        server.failures = 7
        assert_equal(batches_of(far), batches_of(manifest))
    assert waits[:7] == [1, 2, 4, 8, 16, 32, 57] and len(waits) == 21
    server.failure, server.failures, server.retry_after = 429, 2, "90"
    assert_equal(batches_of(far, num_steps=1), batches_of(manifest, num_steps=1))
    server.failures, server.retry_after = 1, email.utils.formatdate(time.time() + 40)
    assert_equal(batches_of(far, num_steps=1), batches_of(manifest, num_steps=1))
    assert waits[21:23] == [90, 30] and 35 < waits[23] < 41
    for seconds in ("600", email.utils.formatdate(time.time() + 600)):
        server.failures, server.retry_after = 8, seconds
        with pytest.raises(DataError, match="HTTP 429"):
            batches_of(far)
        assert waits[24:] == [120] and server.failures == 6, "no server is waited for longer"
        waits.pop()
    server.failure, server.failures, server.retry_after = 503, 8, None
    with pytest.raises(DataError, match=r"shard-\d+.tar: cannot be read \(HTTP 503 Service Unavailable\)"):
        batches_of(far)
    assert sum(waits[24:]) == 120 and server.failures == 0
    (manifest.folder / manifest.shards[2].file).unlink()
    server.requests.clear()
    with pytest.raises(DataError, match=r"elsewhere/manifest.json: no manifest; correct the address"):
        Manifest.load(f"{server.url}/elsewhere")
    with pytest.raises(DataError, match=r"shard-00002.tar: cannot be read \(HTTP 404 Not Found\)"):
        batches_of(far)
    assert [path for path, _ in server.requests].count("/shard-00002.tar") == 1, "time does not mend a 404"
    with pytest.raises(DataError, match=r"pipe:cat x: names no file, expected \{\}"):
        Manifest.load("pipe:cat x")


def test_closing_waits_for_no_server(
    manifest: Manifest, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In earnest: the thread that tries again is told that nobody wants its batches."""
    monkeypatch.setattr(patience, "check_wanted", check_wanted)
    stream = LatentStream(Manifest.load(server.url), order_of(manifest))
    server.failures, server.retry_after = 1000, "100"
    with Worker(stream.batches(0, 1)):  # type: ignore[arg-type]
        while "trying again in 100 s" not in caplog.text:
            time.sleep(0.01)
        before = time.monotonic()
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("way", ["ranges", "through", "cache"])
def test_a_connection_that_ends_early_is_no_damage(
    tmp_path: Path, manifest: Manifest, server: Server, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges, server.cuts = way == "ranges", 3
    far = Manifest.load(server.url)
    assert_equal(batches_of(far, cache=tmp_path / "cache" if way == "cache" else None), batches_of(manifest))
    assert server.cuts == 0 and not any("skipped" in message for message in caplog.messages)


@pytest.mark.parametrize("fault", ["ignores", "shifted"])
def test_bytes_of_another_place_are_not_taken(manifest: Manifest, server: Server, fault: str) -> None:
    far = Manifest.load(server.url)
    setattr(server, fault, 3)
    assert_equal(batches_of(far), batches_of(manifest))
    setattr(server, fault, 100)
    answer = "HTTP 200 with Content-Range none" if fault == "ignores" else "HTTP 206 with Content-Range bytes"
    with pytest.raises(DataError, match=rf"asked for bytes from \d+ on, the server answered {answer}"):
        batches_of(far)


def test_a_whole_shard_is_taken_as_wrong_only_where_it_arrives_so_twice(
    tmp_path: Path, manifest: Manifest, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    far = Manifest.load(server.url)
    server.changes = True
    with pytest.raises(DataError, match=r"shard-\d+.tar: arrived 8 times and was another each time"):
        batches_of(far, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar"))
    server.changes = False
    path = manifest.folder / manifest.shards[1].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    caplog.clear()
    server.requests.clear()
    cache = tmp_path / "cache"
    once = {"start_step": 0, "num_steps": 5}  # within the first epoch
    assert_equal(batches_of(far, cache=cache, **once), batches_of(manifest, **once))
    assert [asked for asked, _ in server.requests].count("/shard-00001.tar") == 2
    assert sum("is not what its manifest says" in message for message in caplog.messages) == 2
    kept = {shard.sha256 for shard in manifest.shards}
    assert {file.stem for file in cache.glob("*.tar")} == kept - {manifest.shards[1].sha256}
    assert not list(cache.glob(".*.tmp"))
    # Mended on the server, it is fetched anew and kept.
    path.write_bytes(whole)
    assert_equal(batches_of(far, cache=cache), batches_of(manifest))
    assert {file.stem: hashlib.sha256(file.read_bytes()).hexdigest() for file in cache.glob("*.tar")} == dict(
        zip(kept, kept, strict=True)
    )


@pytest.mark.parametrize("cached", [True, False])
def test_a_full_disk_is_not_the_network_s_fault(
    tmp_path: Path, manifest: Manifest, waits: list[float], monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Told at once, with the folder that has no room: the cache, or that of temporary files."""
    far = Manifest.load(f"pipe:cat {manifest.folder}/{{}}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full, cache = (tmp_path / "cache", tmp_path / "cache") if cached else (tmp_path, None)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(
            DataError, match=rf"^{full}: a shard cannot be kept in this folder \(File too large\); make"
        ):
            batches_of(far, cache=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not waits and not list(tmp_path.glob("cache/*.tar"))


def test_a_shard_cut_off_on_the_server_is_damage_not_failure(
    manifest: Manifest, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    path = manifest.folder / manifest.shards[1].file
    path.write_bytes(path.read_bytes()[: manifest.shards[1].samples[2].offset + 100])
    far = Manifest.load(server.url)
    order = BatchOrder(far.shapes(), seed=1, global_batch=4, shuffle_window=9)
    stream = LatentStream(far, order, num_steps=12)
    assert len(list(stream)) == 12
    named = " ".join(message for message in caplog.messages if message.endswith("; skipped"))
    assert sorted(re.findall("sample (s[0-9]+):", named)) == ["s007", "s008", "s009"]
