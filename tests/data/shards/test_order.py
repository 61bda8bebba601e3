"""The order of batches, as properties over random manifests."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.shards.order import BatchOrder

A, B = (4, 3, 2, 2), (4, 6, 2, 2)
SHARDS = st.lists(st.lists(st.sampled_from([A, B]), max_size=8), min_size=1, max_size=8)


@st.composite
def orders(draw: st.DrawFn) -> BatchOrder:
    shapes = draw(SHARDS.filter(any))
    seed, window = draw(st.integers(0, 2**40)), draw(st.integers(1, 20))
    return BatchOrder(shapes, seed=seed, global_batch=draw(st.integers(1, 6)), shuffle_window=window)


@given(orders())
def test_every_sample_is_in_one_batch_an_epoch_and_none_is_dropped(order: BatchOrder) -> None:
    """What an epoch leaves over opens the next: line up a shape's batches, and each epoch's share is a permutation."""
    flat = [shape for shard in order.shapes for shape in shard]
    seen: dict[Any, list[int]] = {shape: [] for shape in flat}
    epochs = 6
    for epoch in range(epochs):
        batches = order.epoch(epoch)
        assert len(batches) == order.first_step(epoch + 1) - order.first_step(epoch)
        for batch in batches:
            assert len(batch) == order.global_batch and len({flat[sample] for sample in batch}) == 1
            seen[flat[batch[0]]] += batch
    for shape, line in seen.items():
        samples = {sample for sample, its in enumerate(flat) if its == shape}
        waiting = epochs * len(samples) - len(line)
        assert 0 <= waiting < order.global_batch
        for start in range(0, len(line), len(samples)):
            share = line[start : start + len(samples)]
            assert len(set(share)) == len(share) and set(share) <= samples


@given(orders(), st.integers(0, 5))
def test_batches_appear_as_soon_as_they_are_full(order: BatchOrder, epoch: int) -> None:
    """An epoch's own samples are permuted within their windows only, so that near steps read near shards."""
    line = [sample for shard in order.shards(epoch) for sample in order.samples_of(shard)]
    place = {sample: i for i, sample in enumerate(line)}
    windows = [place[batch[-1]] // order.shuffle_window for batch in order.epoch(epoch)]
    assert windows == sorted(windows)


@given(orders(), st.integers(0, 40))
def test_steps_run_through_the_epochs_and_depend_on_nothing_else(order: BatchOrder, step: int) -> None:
    epoch, batch = order.batch(step)
    assert order.first_step(epoch) <= step < order.first_step(epoch + 1)
    assert order.epoch(epoch)[step - order.first_step(epoch)] == batch
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


@given(orders(), st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=4))
def test_another_size_of_batches_goes_on_where_the_last_one_was(order: BatchOrder, changes: list[Any]) -> None:
    """Whatever sizes follow each other, each shape's samples come in the order that batches of one have."""
    flat = [shape for shard in order.shapes for shape in shard]
    about: dict[str, Any] = {"seed": order.seed, "shuffle_window": order.shuffle_window}
    seen: dict[Any, list[int]] = {shape: [] for shape in flat}
    step = 0
    for steps, size in changes:
        order = BatchOrder(order.shapes, **about, global_batch=size, taken=order.taken(step), first=step)
        for number in range(step, step + steps):
            batch = order.batch(number)[1]
            assert len(batch) == size
            seen[flat[batch[0]]] += batch
        step += steps
    assert order.taken(step) == {shape: len(line) for shape, line in seen.items()}
    one = BatchOrder(order.shapes, **about, global_batch=1)
    singly: dict[Any, list[int]] = {shape: [] for shape in flat}
    for number in itertools.count():
        if all(len(singly[shape]) >= len(line) for shape, line in seen.items()):
            break
        (sample,) = one.batch(number)[1]
        singly[flat[sample]].append(sample)
    assert all(singly[shape][: len(line)] == line for shape, line in seen.items())


@given(orders(), st.integers(0, 30), st.integers(0, 10))
def test_going_on_with_the_same_size_changes_nothing(order: BatchOrder, first: int, more: int) -> None:
    again = BatchOrder(
        order.shapes,
        seed=order.seed,
        global_batch=order.global_batch,
        shuffle_window=order.shuffle_window,
        taken=order.taken(first),
        first=first,
    )
    assert again.batch(first + more) == order.batch(first + more)
    assert again.taken(first + more) == order.taken(first + more)


@given(orders())
def test_what_stands_in_has_the_same_shape_and_goes_round(order: BatchOrder) -> None:
    flat = [shape for shard in order.shapes for shape in shard]
    for first in range(len(flat)):
        shard, place = order.shard_of(first)
        assert order.samples_of(shard)[place] == first
        found, sample = [], order.next_alike(first)
        while sample != first:
            found.append(sample)
            sample = order.next_alike(sample)
        assert sorted([*found, first]) == [sample for sample, shape in enumerate(flat) if shape == flat[first]]


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
    assert [order.batch(step) for step in range(7)] == [
        (0, [1, 6]),
        (0, [5, 2]),
        (0, [0, 3]),
        (1, [4, 0]),
        (1, [5, 2]),
        (1, [1, 6]),
        (1, [3, 4]),
    ]


def test_impossible_orders_say_what_there_is() -> None:
    with pytest.raises(DataError, match="lists no samples"):
        BatchOrder([[]], seed=0, global_batch=1, shuffle_window=8)
    with pytest.raises(DataError, match="global_batch is 0"):
        BatchOrder([[A]], seed=0, global_batch=0, shuffle_window=8)
    with pytest.raises(DataError, match="shuffle_window is 0"):
        BatchOrder([[A]], seed=0, global_batch=1, shuffle_window=0)


def test_a_batch_larger_than_the_folder() -> None:
    order = BatchOrder([[A, A, A]], seed=0, global_batch=4, shuffle_window=8)
    assert [order.first_step(epoch) for epoch in range(6)] == [0, 0, 1, 2, 3, 3]
    line = [sample for step in range(3) for sample in order.batch(step)[1]]
    assert [sorted(line[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4


WEIGHTS = st.sampled_from([1, 2, 3, 0.5, 1.5, 0.3, 0.07])


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[BatchOrder, list[float]]:
    shapes = draw(SHARDS.filter(any))
    weights = draw(st.lists(WEIGHTS, min_size=len(shapes), max_size=len(shapes)))
    order = BatchOrder(
        shapes, seed=draw(st.integers(0, 99)), global_batch=draw(st.integers(1, 6)),
        shuffle_window=draw(st.integers(1, 20)), weights=weights,
    )  # fmt: skip
    return order, weights


@given(mixtures())
def test_each_sample_comes_as_often_as_its_weight_says(mixture: tuple[BatchOrder, list[float]]) -> None:
    """In any number of epochs, and never twice more than another of its weight and shape."""
    order, weights = mixture
    one = BatchOrder(
        order.shapes, seed=order.seed, global_batch=1, shuffle_window=order.shuffle_window, weights=weights
    )
    flat = [(shape, weight) for shard, weight in zip(order.shapes, weights, strict=True) for shape in shard]
    times = [0] * len(flat)
    for epoch in range(7):
        for (sample,) in one.epoch(epoch):
            times[sample] += 1
        for kind in set(flat):
            its = [count for count, other in zip(times, flat, strict=True) if other == kind]
            assert max(its) - min(its) <= 1
            assert sum(its) == int((epoch + 1) * Fraction(str(kind[1])) * len(its))
            if kind[1] in (1, 2, 3):
                assert its == [(epoch + 1) * kind[1]] * len(its)


@given(mixtures(), st.integers(0, 40), st.integers(1, 6), st.integers(0, 20))
def test_a_mixture_goes_on_exactly(mixture: tuple[BatchOrder, list[float]], stop: int, size: int, further: int) -> None:
    """With batches of another size, as another number of GPUs has them: each shape's samples in the same order."""
    order, weights = mixture
    about: dict[str, Any] = {"seed": order.seed, "shuffle_window": order.shuffle_window, "weights": weights}
    flat = [shape for shard in order.shapes for shape in shard]
    again = BatchOrder(order.shapes, **about, global_batch=size, taken=order.taken(stop), first=stop)
    seen: dict[Any, list[int]] = {shape: [] for shape in flat}
    for step in range(stop + further):
        epoch, batch = (order if step < stop else again).batch(step)
        assert epoch >= 0 and len(batch) == (order.global_batch if step < stop else size)
        seen[flat[batch[0]]] += batch
    one = BatchOrder(order.shapes, **about, global_batch=1)
    singly: dict[Any, list[int]] = {shape: [] for shape in flat}
    for epoch in range(10**6):
        if all(len(singly[shape]) >= len(line) for shape, line in seen.items()):
            break
        for (sample,) in one.epoch(epoch):
            singly[flat[sample]].append(sample)
    assert all(singly[shape][: len(line)] == line for shape, line in seen.items())


def test_a_weight_is_a_number_above_0() -> None:
    with pytest.raises(DataError, match="weight is 0, expected a number above 0"):
        BatchOrder([[A]], seed=0, global_batch=1, shuffle_window=1, weights=[0])


def test_each_pass_of_a_weight_below_one_has_an_order_of_its_own():
    """Else the same half of a shard's samples would always come in the same epoch."""
    order = BatchOrder([[(3, 4, 4)] * 82], seed=5, global_batch=1, shuffle_window=8, weights=[0.5])
    epochs = [{batch[0] for batch in order.epoch(epoch)} for epoch in range(6)]
    for first, second in zip(epochs[::2], epochs[1::2], strict=True):
        assert len(first) == len(second) == 41 and first | second == set(range(82))
    assert len({frozenset(epoch) for epoch in epochs}) == 6
