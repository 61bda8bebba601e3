"""Streaming from real tar files: the same batches with any number of workers, ranks and restarts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList
from webdataset.tariterators import tarfile_to_samples

from data.errors import DataError
from data.io import remote
from data.shards.batch import collate
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.reader import SampleReader
from data.shards.sample import Prompt, Sample, TextTokens
from data.shards.stream import LatentStream, read_samples
from tests.helpers.batches import assert_equal, open_shards, order_of


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(manifest: Manifest, workers: int) -> None:
    """11 steps are almost two epochs, and no multiple of the workers."""
    found = list(LatentStream(manifest, order_of(manifest), num_steps=11, workers=workers))
    assert [batch.step for batch in found] == list(range(11))
    assert_equal(found, list(LatentStream(manifest, order_of(manifest), num_steps=11)))


def test_batches_are_what_the_order_says(manifest: Manifest, make_sample: Any) -> None:
    order = order_of(manifest)
    for batch in LatentStream(manifest.folder, order, num_steps=7):
        samples = [make_sample(i, 3 + i % 2) for i in order.batch(batch.step)[1]]
        assert_equal([batch], [collate(samples, batch.step)])


@pytest.mark.parametrize("start", [1, 5, 8])
def test_a_resumed_stream_is_the_tail(manifest: Manifest, start: int) -> None:
    whole = list(LatentStream(manifest, order_of(manifest), num_steps=11))
    resumed = LatentStream(manifest, order_of(manifest), start_step=start, num_steps=11 - start, workers=2)
    assert_equal(list(resumed), whole[start:])


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


def test_only_the_bytes_of_ours_are_read(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    order = order_of(manifest)
    read, fill = [], remote.RemoteFile.fill

    def watch(self: Any, offset: int, buffer: memoryview) -> int:
        read.append((Path(self.url).name, offset, len(buffer)))
        return fill(self, offset, buffer)

    monkeypatch.setattr(remote.RemoteFile, "fill", watch)
    (batch,) = LatentStream(manifest, order, start_step=4, num_steps=1)
    where = {info.key: (shard.file, info.offset, info.bytes) for shard in manifest.shards for info in shard.samples}
    assert read == [where[key] for key in batch.keys]


def test_shards_are_closed_after_their_last_sample(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a window of one the shards are read one after the other."""
    order = BatchOrder(manifest.shapes(), seed=1, global_batch=1, shuffle_window=1)
    open_at_once: list[int] = []
    fetch = SampleReader.fetch

    def watch(self: SampleReader, shard: int, place: int) -> Any:
        content = fetch(self, shard, place)
        open_at_once.append(open_shards(manifest))
        return content

    monkeypatch.setattr(SampleReader, "fetch", watch)
    assert len(list(LatentStream(manifest, order, num_steps=23))) == 23 and set(open_at_once) == {1}


def test_webdataset_itself_reads_the_shards(manifest: Manifest) -> None:
    pipeline = DataPipeline(SimpleShardList(list(manifest.urls)), tarfile_to_samples())
    found = [Sample.from_entry(entry) for entry in pipeline]
    assert [sample.key for sample in found] == [info.key for info in manifest.samples]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(found, read_samples(manifest), strict=True))


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


def test_another_prompt_takes_the_place_of_captions(make_sample: Any) -> None:
    batch = collate([make_sample(0), make_sample(1), make_sample(2)], step=0)
    for length in (2, 6):
        prompt = Prompt({"umt5": TextTokens(torch.full((length, 6), 7.0), torch.ones(length, dtype=torch.bool))},
                        {"clip": torch.full((5,), 8.0)})  # fmt: skip
        found = batch.with_prompt([0, 2], prompt)
        tokens, mask = found.text["umt5"].tokens, found.text["umt5"].mask
        assert tokens.shape == (3, max(4, length), 6) and mask.sum(1).tolist() == [length, 3, length]
        assert (tokens[0, :length] == 7).all() and not tokens[0, length:].any()
        assert torch.equal(tokens[1, :4], batch.text["umt5"].tokens[1])
        assert (found.pooled["clip"][[0, 2]] == 8).all() and torch.equal(
            found.pooled["clip"][1], batch.pooled["clip"][1]
        )
    assert batch.text["umt5"].mask.sum(1).tolist() == [2, 3, 4], "the batch itself stays"
    with pytest.raises(DataError, match=r"the empty prompt has pooled \[\], the samples have \['clip'\]"):
        batch.with_prompt([0], Prompt(prompt.text, {}))


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


def test_workers_end_with_who_asks_them(manifest: Manifest) -> None:
    batches = iter(LatentStream(manifest, order_of(manifest), workers=3))
    next(batches)
    assert sum(thread.name.startswith("loader") for thread in threading.enumerate()) == 3
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


WALK = """
import json, sys, torch
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.stream import LatentStream
if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, rank, world, workers, start, steps = sys.argv[1], *map(int, sys.argv[2:])
    manifest = Manifest.load(folder)
    order = BatchOrder(manifest.shapes(), seed=1, global_batch=4, shuffle_window=9)
    for batch in LatentStream(
        manifest, order, rank=rank, world=world, start_step=start, num_steps=steps, workers=workers
    ):
        print(json.dumps([batch.step, batch.keys, batch.latent.float().sum().item()]), flush=True)
"""


def walk(folder: Path, rank: int, world: int, workers: int, start: int, steps: int) -> subprocess.Popen[str]:
    words = [str(word) for word in (folder, rank, world, workers, start, steps)]
    return subprocess.Popen([sys.executable, "-c", WALK, *words], stdout=subprocess.PIPE, encoding="utf-8")


def lines_of(process: subprocess.Popen[str]) -> list[Any]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


def test_processes_of_groups_see_every_sample_once_an_epoch(manifest: Manifest) -> None:
    """Four processes, two sequence-parallel groups of two, other numbers of workers in each; 23 samples, 4 a step."""
    steps = 23  # four epochs exactly
    started = [walk(manifest.folder, group, 2, workers, 0, steps) for group in (0, 1) for workers in (0, 1)]
    first, first_twin, second, second_twin = map(lines_of, started)
    assert first == first_twin and second == second_twin
    keys = [key for a, b in zip(first, second, strict=True) for key in (*a[1], *b[1])]
    assert Counter(keys) == dict.fromkeys([info.key for info in manifest.samples], 4)
    assert not {key for a in first[:5] for key in a[1]} & {key for b in second[:5] for key in b[1]}


def test_a_killed_reader_resumes_where_it_was(manifest: Manifest) -> None:
    whole = lines_of(walk(manifest.folder, 0, 1, 0, 0, 40))
    killed = walk(manifest.folder, 0, 1, 2, 0, 40)
    assert killed.stdout is not None
    seen = [json.loads(killed.stdout.readline()) for _ in range(13)]
    killed.kill()
    killed.communicate()
    assert seen + lines_of(walk(manifest.folder, 0, 1, 1, 13, 27)) == whole
