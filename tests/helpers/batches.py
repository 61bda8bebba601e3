"""What tests of streams share: an order, and whether batches are the same."""

from __future__ import annotations

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
