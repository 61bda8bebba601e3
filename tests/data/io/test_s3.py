"""Shards in a real S3 server, which the tests start: streamed, resumed, kept in a cache, checked."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from data import check
from data.errors import DataError
from data.shards.batch import Batch
from data.shards.manifest import Manifest
from data.shards.stream import LatentStream, read_samples
from tests.helpers.batches import assert_equal, order_of

s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
pytestmark = pytest.mark.usefixtures("waits")


def uploaded(manifest: Manifest, bucket: str, name: str) -> Manifest:
    """The folder in the bucket."""
    s3fs.S3FileSystem().put(str(manifest.folder), f"{bucket}/{name}", recursive=True)
    return Manifest.load(f"{bucket}/{name}")


def batches_of(manifest: Manifest, **more: object) -> list[Batch]:
    return list(LatentStream(manifest, order_of(manifest), **{"num_steps": 8, **more}))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_streamed(manifest: Manifest, bucket: str, workers: int) -> None:
    far = uploaded(manifest, bucket, f"streamed-{workers}")
    assert far == manifest
    assert_equal(batches_of(far, workers=workers), batches_of(manifest))
    found, expected = far.load_empty_prompt(), manifest.load_empty_prompt()
    assert torch.equal(found.text["umt5"].tokens, expected.text["umt5"].tokens)
    assert [sample.key for sample in read_samples(far, 3)] == [info.key for info in manifest.samples[:3]]


def test_a_resumed_run_goes_on(manifest: Manifest, bucket: str) -> None:
    far = uploaded(manifest, bucket, "resumed")
    assert_equal(batches_of(far, start_step=5, num_steps=3), batches_of(manifest)[5:])


def test_a_cache_keeps_whole_shards(manifest: Manifest, bucket: str, tmp_path: Path) -> None:
    far = uploaded(manifest, bucket, "cached")
    cache = tmp_path / "cache"
    assert_equal(batches_of(far, cache=cache, workers=2), batches_of(manifest))
    assert {path.stem for path in cache.glob("*.tar")} == {shard.sha256 for shard in manifest.shards}
    s3fs.S3FileSystem().rm(f"{bucket}/cached", recursive=True)
    assert_equal(batches_of(far, cache=cache), batches_of(manifest))


def test_shards_are_checked(manifest: Manifest, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    far = uploaded(manifest, bucket, "checked")
    assert check.main([far.home]) == 0
    assert "23 of 23 whole" in capsys.readouterr().out
    s3fs.S3FileSystem().pipe_file(f"{bucket}/checked/shard-00001.tar", b"x" * manifest.shards[1].bytes)
    assert check.main([far.home]) == 1
    assert f"damaged: {far.home}/shard-00001.tar: SHA-256 is" in capsys.readouterr().out


def test_what_is_missing_or_may_not_be_read_is_told_at_once(
    manifest: Manifest, bucket: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = uploaded(manifest, bucket, "missing")
    s3fs.S3FileSystem().rm_file(f"{bucket}/missing/shard-00002.tar")
    with pytest.raises(DataError, match=r"^s3://videos/missing/shard-00002.tar: cannot be read \(.*\); check"):
        batches_of(far)
    with pytest.raises(DataError, match=r"^s3://nobody/x/manifest.json: no manifest; correct the address, or"):
        Manifest.load("s3://nobody/x")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"manifest.json: cannot be read \(NoCredentialsError: Unable to locate cred"):
        Manifest.load(far.home)
    assert not waits


def test_a_port_where_no_s3_is_is_told_at_once(
    bucket: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"manifest.json: cannot be read \(EndpointConnectionError: Could not connect"):
        Manifest.load(f"{bucket}/x")
    assert not waits
