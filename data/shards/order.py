"""Which samples a training step gets: a pure function of (seed, step) over the shapes in a manifest.

An epoch visits the shards in an order drawn from (seed, epoch). The samples, lined up in that order, are permuted
inside windows of `shuffle_window` consecutive ones, so that steps near each other read the same few shards. Walking
through the permuted samples, each goes to the bucket of its shape; a full bucket is the next global batch. What is left
in the buckets when the epoch ends opens the next one: every sample is in exactly one batch an epoch, and none is
dropped or repeated, whatever the batch.

A shard may have a weight: how often each of its samples comes in an epoch. With 2 that is twice, with 0.5 once in two
epochs: samples of one weight and shape are passed through again and again, each pass in an order of its own that is
drawn from (seed, pass), and an epoch takes up the passes where the one before has left them.

Nothing here knows of workers, and ranks only take parts of a batch that is the same for all, so any number of either
sees the same steps.

Where training stands is, for each shape, how many of its samples it has had: batches take them in their order, whatever
the size of a batch. So an order can begin there with batches of another size, and no sample of the epoch is left out or
comes twice.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from data.errors import DataError

Item = TypeVar("Item")
_LINES = 4  # epochs whose order is remembered


class BatchOrder:
    """The order of global batches, without end, epoch after epoch.

    Args:
        shapes: for each shard the shape of each sample, as `Manifest.shapes()` gives; samples are numbered through.
        seed: draws the order.
        global_batch: samples a step, over all data-parallel ranks (a micro-batch under gradient accumulation).
        shuffle_window: how many consecutive samples are permuted among each other, in samples; 1 leaves them in the
            order of their shard.
        weights: for each shard how often each of its samples comes in an epoch; None is once.
        taken: of each shape how many samples went before; none for shapes that it lacks.
        first: the number of the step that comes after them, from where on there are batches.

    Raises:
        DataError: when a number is below 1, a weight is not above 0, or there are no samples.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[Sequence[int]]],
        *,
        seed: int,
        global_batch: int,
        shuffle_window: int,
        weights: Sequence[float] | None = None,
        taken: Mapping[tuple[int, ...], int] | None = None,
        first: int = 0,
    ) -> None:
        for name, value in (("global_batch", global_batch), ("shuffle_window", shuffle_window)):
            if value < 1:
                raise DataError(f"{name} is {value}, expected at least 1")
        self.shapes = [[tuple(shape) for shape in shard] for shard in shapes]
        self.seed = seed
        self.global_batch = global_batch
        self.shuffle_window = shuffle_window
        self._flat = [shape for shard in self.shapes for shape in shard]
        if not self._flat:
            raise DataError("the manifest lists no samples, expected at least one; make more clips")
        self._starts = list(itertools.accumulate((len(shard) for shard in self.shapes), initial=0))
        self._groups = self._grouped([1.0] * len(self.shapes) if weights is None else weights)
        self._taken = {shape: (taken or {}).get(shape, 0) for shape in self._groups}
        self.first = first
        self._lines: dict[int, list[int]] = {}
        self._memo: tuple[int, list[list[int]]] | None = None

    def shards(self, epoch: int) -> list[int]:
        """The shards' numbers in the order of this epoch, each as often as any of its samples comes."""
        return [shard for shard, _ in self._rounds(epoch, self._times(epoch))]

    def samples_of(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        return range(self._starts[shard], self._starts[shard + 1])

    def shard_of(self, sample: int) -> tuple[int, int]:
        """The number of the shard that holds a sample, and the sample's place in it."""
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]

    def first_step(self, epoch: int) -> int:
        """The first global step that an epoch's samples complete: where the epoch begins."""
        return self.first + sum(
            max(0, self._before(shape, epoch) - taken) // self.global_batch for shape, taken in self._taken.items()
        )

    def epoch_of(self, step: int) -> int:
        """The epoch whose samples complete global step `step` (from `first`)."""
        beyond = 1
        while self.first_step(beyond) <= step:
            beyond *= 2
        return bisect_right(range(beyond), step, key=self.first_step) - 1

    def epoch(self, epoch: int) -> list[list[int]]:
        """The global batches that an epoch completes: `global_batch` sample numbers each, of one shape within a batch.

        The first of each shape may begin with samples that the epochs before left over. There are none when an epoch
        fills no bucket.
        """
        if self._memo is None or self._memo[0] != epoch:
            self._memo = (epoch, self._batches(epoch))
        return self._memo[1]

    def batch(self, step: int) -> tuple[int, list[int]]:
        """The epoch that completes global step `step` (from `first`), and its batch."""
        epoch = self.epoch_of(step)
        return epoch, self.epoch(epoch)[step - self.first_step(epoch)]

    def part(self, step: int, rank: int, world: int) -> list[int]:
        """The samples of one data-parallel rank: every `world`-th of the global batch, from `rank` on."""
        return self.batch(step)[1][rank::world]

    def taken(self, step: int) -> dict[tuple[int, ...], int]:
        """Of each shape how many samples come before global step `step` (from `first`): where another order goes on."""
        epoch = self.epoch_of(step)
        found = {
            shape: taken + max(0, self._before(shape, epoch) - taken) // self.global_batch * self.global_batch
            for shape, taken in self._taken.items()
        }
        for batch in self.epoch(epoch)[: step - self.first_step(epoch)]:
            found[self._flat[batch[0]]] += self.global_batch
        return found

    def next_alike(self, sample: int) -> int:
        """The next sample of the same shape in the numbering, from the last on to the first: what stands in for it."""
        following = itertools.chain(range(sample + 1, len(self._flat)), range(sample + 1))
        return next(other for other in following if self._flat[other] == self._flat[sample])

    def _batches(self, epoch: int) -> list[list[int]]:
        buckets = {shape: self._left_over(shape, epoch) for shape in self._taken}
        gone = {shape: max(0, taken - self._before(shape, epoch)) for shape, taken in self._taken.items()}
        batches = []
        for sample in self._line(epoch):
            if gone[self._flat[sample]]:
                gone[self._flat[sample]] -= 1
                continue
            bucket = buckets[self._flat[sample]]
            bucket.append(sample)
            if len(bucket) == self.global_batch:
                batches.append(bucket)
                buckets[self._flat[sample]] = []
        return batches

    def _left_over(self, shape: tuple[int, ...], epoch: int) -> list[int]:
        """The samples of a shape that wait in its bucket when an epoch begins, in their order."""
        waiting = max(0, self._before(shape, epoch) - self._taken[shape]) % self.global_batch
        found: list[int] = []
        while len(found) < waiting:
            epoch -= 1
            found = [sample for sample in self._line(epoch) if self._flat[sample] == shape] + found
        return found[len(found) - waiting :]

    def _line(self, epoch: int) -> list[int]:
        """All samples in the order of an epoch."""
        if epoch not in self._lines:
            times = self._times(epoch)
            line = [
                sample
                for shard, done in self._rounds(epoch, times)
                for sample in self.samples_of(shard)
                if times[sample] > done
            ]
            windows = range(0, len(line), self.shuffle_window)
            shuffled = [
                _permuted(line[start : start + self.shuffle_window], f"{self.seed}/{epoch}/window/{start}")
                for start in windows
            ]
            self._lines[epoch] = list(itertools.chain.from_iterable(shuffled))
            while len(self._lines) > _LINES:
                del self._lines[next(iter(self._lines))]
        return self._lines[epoch]

    def _rounds(self, epoch: int, times: Sequence[int]) -> list[tuple[int, int]]:
        """The shards in the order of an epoch, each with how often it came before in it."""
        most = [max((times[sample] for sample in self.samples_of(n)), default=1) for n in range(len(self.shapes))]
        rounds = [(shard, done) for shard, count in enumerate(most) for done in range(count)]
        return _permuted(rounds, f"{self.seed}/{epoch}/shards")

    def _grouped(self, weights: Sequence[float]) -> dict[tuple[int, ...], list[_Group]]:
        """For each shape its samples by their weights."""
        found: dict[tuple[int, ...], dict[Fraction, list[int]]] = {}
        for shard, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise DataError(f"weight is {weight}, expected a number above 0")
            for sample in self.samples_of(shard):
                group = found.setdefault(self._flat[sample], {}).setdefault(Fraction(str(weight)), [])
                group.append(sample)
        return {shape: [_Group(*group) for group in by_weight.items()] for shape, by_weight in found.items()}

    def _before(self, shape: tuple[int, ...], epoch: int) -> int:
        """How many samples of a shape come before an epoch begins."""
        return sum(group.before(epoch) for group in self._groups[shape])

    def _times(self, epoch: int) -> list[int]:
        """How often each sample comes in an epoch."""
        times = [0] * len(self._flat)
        for shape, groups in self._groups.items():
            for group in groups:
                first, last, size = group.before(epoch), group.before(epoch + 1), len(group.samples)
                for number in range(first // size, -(-last // size)):
                    start, end = max(0, first - number * size), min(size, last - number * size)
                    chosen = group.samples
                    if end - start < size:
                        name = f"{self.seed}/pass/{number}/{group.weight}/{shape}"
                        chosen = _permuted(chosen, name)[start:end]
                    for sample in chosen:
                        times[sample] += 1
        return times


@dataclass(frozen=True)
class _Group:
    """Samples of one weight and shape."""

    weight: Fraction
    samples: list[int]

    def before(self, epoch: int) -> int:
        """How many of them come before an epoch begins, each time counted."""
        return math.floor(epoch * self.weight * len(self.samples))


def _permuted(items: list[Item], seed: str) -> list[Item]:
    """`items` in an order drawn from `seed`, the same on every machine and Python."""
    # random() is the one method whose sequence Python promises to keep for a seed; shuffle() is not.
    rng = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
