"""What tests of streams share: an order, whether batches are the same, and how many shards are open."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from data.shards.batch import Batch
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder


def order_of(manifest: Manifest, global_batch: int = 4) -> BatchOrder:
    return BatchOrder(manifest.shapes(), seed=1, global_batch=global_batch, shuffle_window=9)


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.latent, b.latent)
        assert torch.equal(a.text["umt5"].tokens, b.text["umt5"].tokens)
        assert torch.equal(a.text["umt5"].mask, b.text["umt5"].mask)
        assert torch.equal(a.pooled["clip"], b.pooled["clip"]) and torch.equal(a.image["first"], b.image["first"])


def open_shards(manifest: Manifest) -> int:
    """How many of a folder's shards this process has open."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists the others has gone
            found.append(descriptor.readlink())
    return sum(manifest.folder.resolve() / shard.file in found for shard in manifest.shards)
