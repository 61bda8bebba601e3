"""The order of batches, as properties over random manifests."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.order import BatchOrder

A, B = (4, 3, 2, 2), (4, 6, 2, 2)
SHARDS = st.lists(st.lists(st.sampled_from([A, B]), max_size=8), min_size=1, max_size=8)


@st.composite
def orders(draw: st.DrawFn) -> BatchOrder:
    shapes, batch = draw(SHARDS), draw(st.integers(1, 6))
    counts = Counter(shape for shard in shapes for shape in shard)
    assume(any(count >= batch for count in counts.values()))
    seed, window = draw(st.integers(0, 2**40)), draw(st.integers(1, 20))
    return BatchOrder(shapes, seed=seed, global_batch=batch, shuffle_window=window)


@given(orders(), st.integers(0, 5))
def test_an_epoch_has_full_batches_of_one_shape_and_no_sample_twice(order: BatchOrder, epoch: int) -> None:
    flat = [shape for shard in order.shapes for shape in shard]
    batches = order.epoch(epoch)
    assert len(batches) == order.batches_per_epoch
    seen = [sample for batch in batches for sample in batch]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(len(flat)))
    for batch in batches:
        assert len(batch) == order.global_batch and len({flat[sample] for sample in batch}) == 1
    dropped = Counter(flat) - Counter(flat[sample] for sample in seen)
    assert all(count < order.global_batch for count in dropped.values())


@given(orders(), st.integers(0, 40))
def test_steps_run_through_the_epochs_and_depend_on_nothing_else(order: BatchOrder, step: int) -> None:
    epoch, batch = order.batch(step)
    position = step - epoch * order.batches_per_epoch
    assert 0 <= position < order.batches_per_epoch and order.epoch(epoch)[position] == batch
    again = BatchOrder(
        order.shapes, seed=order.seed, global_batch=order.global_batch, shuffle_window=order.shuffle_window
    )
    again.batch(0)
    assert again.batch(step) == (epoch, batch)


@given(orders(), st.integers(0, 20), st.integers(1, 5))
def test_parts_of_any_number_of_ranks_partition_the_batch(order: BatchOrder, step: int, world: int) -> None:
    parts = [order.part(step, rank, world) for rank in range(world)]
    assert sorted(sample for part in parts for sample in part) == sorted(order.batch(step)[1])
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(orders(), st.integers(0, 5))
def test_a_reader_of_the_shards_holds_one_window_and_the_open_buckets_at_most(order: BatchOrder, epoch: int) -> None:
    flat = [shape for shard in order.shapes for shape in shard]
    used = {sample for batch in order.epoch(epoch) for sample in batch}
    waiting, held, most = list(order.epoch(epoch)), set[int](), 0
    for shard in order.shards(epoch):
        for sample in order.samples_of(shard):
            held |= {sample} & used
            most = max(most, len(held))
            while waiting and held.issuperset(waiting[0]):
                held.difference_update(waiting.pop(0))
    assert not waiting
    assert most <= order.shuffle_window + len(set(flat)) * order.global_batch


@settings(max_examples=30)
@given(st.integers(0, 2**40))
def test_epochs_and_seeds_differ(seed: int) -> None:
    shapes = [[A] * 10] * 4
    order = BatchOrder(shapes, seed=seed, global_batch=4, shuffle_window=16)
    other = BatchOrder(shapes, seed=seed + 1, global_batch=4, shuffle_window=16)
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != other.epoch(0)
    unshuffled = BatchOrder(shapes, seed=seed, global_batch=10, shuffle_window=1)
    assert all(batch == list(range(batch[0], batch[0] + 10)) for batch in unshuffled.epoch(0))


def test_the_order_is_frozen() -> None:
    """A run must resume in the same order after an upgrade: these numbers may never change."""
    order = BatchOrder([[A, A, B], [A, A], [B, A]], seed=3, global_batch=2, shuffle_window=4)
    assert [order.batch(step) for step in range(6)] == [
        (0, [1, 6]),
        (0, [5, 2]),
        (0, [0, 3]),
        (1, [5, 2]),
        (1, [0, 1]),
        (1, [6, 3]),
    ]


def test_impossible_orders_say_what_there_is() -> None:
    with pytest.raises(DataError, match=r"no batch of 4 .* of 3 of shape \[4, 3, 2, 2\], 1 of shape \[4, 6, 2, 2\]"):
        BatchOrder([[A, A], [A, B]], seed=0, global_batch=4, shuffle_window=8)
    with pytest.raises(DataError, match="can be made of no samples"):
        BatchOrder([[]], seed=0, global_batch=1, shuffle_window=8)
    with pytest.raises(DataError, match="global_batch is 0"):
        BatchOrder([[A]], seed=0, global_batch=0, shuffle_window=8)
    with pytest.raises(DataError, match="shuffle_window is 0"):
        BatchOrder([[A]], seed=0, global_batch=1, shuffle_window=0)
    assert BatchOrder([[A, A, B]], seed=0, global_batch=2, shuffle_window=8).unused == {B: 1}
