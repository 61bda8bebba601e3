"""Streaming from real tar files: the same batches with any number of workers, ranks and restarts."""

from __future__ import annotations

import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data import stream
from data.batch import Batch, collate
from data.errors import DataError
from data.manifest import FILE, Manifest
from data.order import BatchOrder
from data.stream import LatentStream, read_samples


def lengths(index: int) -> int:
    return 3 + index % 2


@pytest.fixture
def manifest(make_folder: Any) -> Manifest:
    """23 samples of two shapes in 5 shards."""
    made: Manifest = make_folder(23, frames=lengths)
    return made


def order_of(manifest: Manifest, global_batch: int = 4) -> BatchOrder:
    return BatchOrder(manifest.shapes(), seed=1, global_batch=global_batch, shuffle_window=9)


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.captions == b.captions and torch.equal(a.latent, b.latent)
        assert torch.equal(a.text["umt5"].tokens, b.text["umt5"].tokens)
        assert torch.equal(a.text["umt5"].mask, b.text["umt5"].mask)
        assert torch.equal(a.pooled["clip"], b.pooled["clip"]) and torch.equal(a.image["first"], b.image["first"])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(manifest: Manifest, workers: int) -> None:
    """11 steps are more than two epochs of 5, and no multiple of the workers."""
    batches = LatentStream(manifest, order_of(manifest), num_steps=11)
    found = list(DataLoader(batches, batch_size=None, num_workers=workers))
    assert [batch.step for batch in found] == list(range(11))
    assert_equal(found, list(batches))


def test_batches_are_what_the_order_says(manifest: Manifest, make_sample: Any) -> None:
    order = order_of(manifest)
    for batch in LatentStream(manifest.folder, order, num_steps=7):
        samples = [make_sample(i, lengths(i)) for i in order.batch(batch.step)[1]]
        assert_equal([batch], [collate(samples, batch.step)])


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_stream_is_the_tail(manifest: Manifest, start: int) -> None:
    whole = list(LatentStream(manifest, order_of(manifest), num_steps=11))
    resumed = LatentStream(manifest, order_of(manifest), start_step=start, num_steps=11 - start)
    assert_equal(list(DataLoader(resumed, batch_size=None, num_workers=2)), whole[start:])


def test_a_stream_without_end_goes_on(manifest: Manifest) -> None:
    endless = LatentStream(manifest, order_of(manifest), start_step=3)
    assert [batch.step for batch in itertools.islice(endless, 20)] == list(range(3, 23))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(manifest: Manifest, world: int) -> None:
    whole = list(LatentStream(manifest, order_of(manifest), num_steps=6))
    ranks = [list(LatentStream(manifest, order_of(manifest), rank=r, world=world, num_steps=6)) for r in range(world)]
    for step, batch in enumerate(whole):
        for r in range(world):
            assert ranks[r][step].keys == batch.keys[r::world]
            assert torch.equal(ranks[r][step].latent, batch.latent[r::world])


def test_shards_without_ours_stay_closed_and_entries_not_ours_undecoded(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = order_of(manifest)
    opened, decoded, read = [], [], stream.read_shard

    def watch(url: str, wanted: Any) -> Any:
        opened.append(Path(url).name)
        for sample in read(url, wanted):
            decoded.append(sample.key)
            yield sample

    monkeypatch.setattr(stream, "read_shard", watch)
    (batch,) = LatentStream(manifest, order, start_step=4, num_steps=1)
    files = {info.key: shard.file for shard in manifest.shards for info in shard.samples}
    assert sorted(opened) == sorted({files[key] for key in batch.keys}) and len(opened) < len(manifest.shards)
    assert sorted(decoded) == sorted(batch.keys)


def test_shards_behind_a_command(manifest: Manifest) -> None:
    urls = [f"pipe:cat {manifest.folder}/{shard.file}" for shard in manifest.shards]
    piped = LatentStream(Manifest.load(manifest.folder, urls=urls), order_of(manifest), num_steps=6)
    assert_equal(list(piped), list(LatentStream(manifest, order_of(manifest), num_steps=6)))
    broken = Manifest.load(manifest.folder, urls=["pipe:exit 3"] * len(urls))
    with pytest.raises(DataError, match="pipe:exit 3: reading failed at or after sample s000"):
        list(read_samples(broken))


def test_read_samples(manifest: Manifest) -> None:
    assert [sample.key for sample in read_samples(manifest.folder)] == [info.key for info in manifest.samples]
    assert [sample.key for sample in read_samples(manifest, 7)] == [f"s{i:03d}" for i in range(7)]
    assert list(read_samples(manifest, 0)) == []


def test_texts_are_padded_and_masked(make_sample: Any) -> None:
    batch = collate([make_sample(0), make_sample(2)], step=9)
    text = batch.text["umt5"]
    assert text.tokens.shape == (2, 4, 6) and text.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert not text.tokens[0, 2:].any() and torch.equal(text.tokens[1], make_sample(2).text["umt5"].tokens)
    moved = batch.to("meta")
    assert moved.latent.is_meta and moved.text["umt5"].mask.is_meta and moved.image["first"].is_meta
    assert moved.step == 9 and moved.keys == ["s000", "s002"] and moved.latent.dtype == torch.bfloat16


def test_samples_that_do_not_match_are_named(make_sample: Any) -> None:
    other = make_sample(1)
    other.pooled["clip"] = torch.zeros(6)
    with pytest.raises(DataError, match=r"s001: pooled.clip is torch.float32 \(6,\), sample s000 has torch.float32"):
        collate([make_sample(0), other], 0)
    del other.pooled["clip"]
    with pytest.raises(DataError, match=r"s001: pooled has \[\], sample s000 has \['clip'\]"):
        collate([make_sample(0), other], 0)


def test_arguments_that_do_not_fit(manifest: Manifest, make_folder: Any) -> None:
    order = order_of(manifest)
    with pytest.raises(DataError, match="made for another manifest"):
        LatentStream(make_folder(9, "other"), order)
    with pytest.raises(DataError, match="global batch 4 cannot be split over 3 ranks"):
        LatentStream(manifest, order, rank=0, world=3)
    with pytest.raises(DataError, match="rank is 2, expected 0 to 1"):
        LatentStream(manifest, order, rank=2, world=2)
    with pytest.raises(DataError, match="start_step is -1"):
        LatentStream(manifest, order, start_step=-1)


def damage(manifest: Manifest, shard: int, start: int, content: bytes | None) -> None:
    """Overwrite a shard from byte `start` on, or cut it off there."""
    path = manifest.folder / manifest.shards[shard].file
    whole = path.read_bytes()
    path.write_bytes(whole[:start] if content is None else whole[:start] + content + whole[start + len(content) :])


def offset_of(manifest: Manifest, shard: int, name: str) -> int:
    with tarfile.open(manifest.folder / manifest.shards[shard].file) as tar:
        return tar.getmember(name).offset_data


@pytest.mark.parametrize("kind", ["cut", "header", "tensors", "json", "gone"])
def test_damaged_shards_are_named_with_the_key(manifest: Manifest, kind: str) -> None:
    tensors = offset_of(manifest, 1, "s007.safetensors")
    if kind == "cut":
        damage(manifest, 1, tensors + 10, None)
    elif kind == "header":
        damage(manifest, 1, offset_of(manifest, 1, "s007.json") - 512, b"\xff" * 512)
    elif kind == "tensors":
        damage(manifest, 1, tensors, b"\xff" * 8)
    elif kind == "json":
        damage(manifest, 1, offset_of(manifest, 1, "s007.json"), b"]")
    else:
        (manifest.folder / manifest.shards[1].file).unlink()
    key = {"gone": "s005"}.get(kind, "s007")
    with pytest.raises(DataError, match=f"shard-00001.tar: .*sample {key}"):
        list(read_samples(manifest))


def test_a_worker_s_error_arrives_as_one_line(manifest: Manifest) -> None:
    damage(manifest, 1, offset_of(manifest, 1, "s007.safetensors"), b"\xff" * 8)
    batches = LatentStream(manifest, order_of(manifest), num_steps=10)
    loader = iter(DataLoader(batches, batch_size=None, num_workers=2))
    with pytest.raises(DataError) as caught:
        list(loader)
    # The error's traceback keeps the loader in a cycle; torch takes 5 s a worker to shut down one that gc collects.
    loader._shutdown_workers()  # type: ignore[attr-defined]
    message = str(caught.value)
    assert message.startswith(f"{manifest.folder}/shard-00001.tar: sample s007: ") and "\n" not in message


def test_a_manifest_of_other_shapes_is_noticed(manifest: Manifest) -> None:
    path = manifest.folder / FILE
    raw = json.loads(path.read_text())
    raw["shards"][0]["samples"][0]["shape"] = [4, 9, 2, 2]
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"shard-00000.tar: sample s000: latent has shape \[4, 3, 2, 2\], the manifest"):
        list(read_samples(manifest.folder))
