"""Which samples a training step gets: a pure function of (seed, step) over the shapes in a manifest.

An epoch visits the shards in an order drawn from (seed, epoch). The samples, lined up in that order, are permuted
inside windows of `shuffle_window` consecutive ones, so a reader that walks through the shards never holds more than
one window and the unfilled buckets. Walking through the permuted samples, each goes to the bucket of its shape; a
full bucket is the next global batch. What is left in the buckets when the epoch ends is dropped: with other epochs,
other samples.

Nothing here knows of workers, and ranks only take parts of a batch that is the same for all, so any number of either
sees the same steps.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Sequence

from data.errors import DataError


class BatchOrder:
    """The order of global batches, without end, epoch after epoch.

    Args:
        shapes: for each shard the shape of each sample, as `Manifest.shapes()` gives; samples are numbered through.
        seed: draws the order.
        global_batch: samples a step, over all data-parallel ranks (a micro-batch under gradient accumulation).
        shuffle_window: how many consecutive samples are permuted among each other, in samples; 1 leaves them in the
            order of their shard.

    Attributes:
        batches_per_epoch: the same for each epoch.
        unused: shapes with fewer samples than a global batch, and how many; these samples are never seen.

    Raises:
        DataError: when a number is below 1 or no shape has enough samples for one batch.
    """

    def __init__(
        self, shapes: Sequence[Sequence[Sequence[int]]], *, seed: int, global_batch: int, shuffle_window: int
    ) -> None:
        for name, value in (("global_batch", global_batch), ("shuffle_window", shuffle_window)):
            if value < 1:
                raise DataError(f"{name} is {value}, expected at least 1")
        self.shapes = [[tuple(shape) for shape in shard] for shard in shapes]
        self.seed = seed
        self.global_batch = global_batch
        self.shuffle_window = shuffle_window
        self._flat = [shape for shard in self.shapes for shape in shard]
        counts = Counter(self._flat)
        self.batches_per_epoch = sum(count // global_batch for count in counts.values())
        self.unused = {shape: count for shape, count in counts.items() if count < global_batch}
        if self.batches_per_epoch == 0:
            found = ", ".join(f"{count} of shape {list(shape)}" for shape, count in sorted(counts.items()))
            hint = "a batch holds one shape; make more clips or lower the global batch"
            raise DataError(f"no batch of {global_batch} samples can be made of {found or 'no samples'}: {hint}")
        self._starts = list(itertools.accumulate((len(shard) for shard in self.shapes), initial=0))
        self._memo: tuple[int, list[list[int]]] | None = None

    def shards(self, epoch: int) -> list[int]:
        """The shards' numbers in the order of this epoch."""
        return _permuted(list(range(len(self.shapes))), f"{self.seed}/{epoch}/shards")

    def samples_of(self, shard: int) -> range:
        """The numbers of a shard's samples."""
        return range(self._starts[shard], self._starts[shard + 1])

    def epoch(self, epoch: int) -> list[list[int]]:
        """The epoch's global batches: lists of `global_batch` sample numbers, all of one shape within a batch."""
        if self._memo is None or self._memo[0] != epoch:
            self._memo = (epoch, self._batches(epoch))
        return self._memo[1]

    def batch(self, step: int) -> tuple[int, list[int]]:
        """The epoch in which global step `step` (from 0) lies, and its batch."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return epoch, self.epoch(epoch)[position]

    def part(self, step: int, rank: int, world: int) -> list[int]:
        """The samples of one data-parallel rank: every `world`-th of the global batch, from `rank` on."""
        return self.batch(step)[1][rank::world]

    def _batches(self, epoch: int) -> list[list[int]]:
        line = [sample for shard in self.shards(epoch) for sample in self.samples_of(shard)]
        buckets: dict[tuple[int, ...], list[int]] = {}
        batches = []
        for start in range(0, len(line), self.shuffle_window):
            window = line[start : start + self.shuffle_window]
            for sample in _permuted(window, f"{self.seed}/{epoch}/window/{start}"):
                bucket = buckets.setdefault(self._flat[sample], [])
                bucket.append(sample)
                if len(bucket) == self.global_batch:
                    batches.append(buckets.pop(self._flat[sample]))
        return batches


def _permuted(items: list[int], seed: str) -> list[int]:
    """`items` in an order drawn from `seed`, the same on every machine and Python."""
    # random() is the one method whose sequence Python promises to keep for a seed; shuffle() is not.
    rng = random.Random(int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big"))
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]
