"""Streaming: from shards to batches in the exact order of a `BatchOrder`.

Worker w of W makes steps w, w + W, …; a DataLoader asks its workers in turn, which restores the order. A step's samples
are read where they lie, one range of bytes each, so little is held beyond a batch and nothing is read to be skipped:
where training stands is one number, the steps it consumed, and `start_step` resumes there at once, with any number of
workers and ranks.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data.batch import Batch, collate
from data.errors import BadSampleError, DataError
from data.manifest import Manifest
from data.order import BatchOrder
from data.reader import SampleReader
from data.sample import Sample

AHEAD = 2  # samples whose bytes are fetched before they are needed
log = logging.getLogger(__name__)


class LatentStream(IterableDataset[Batch]):
    """Batches of one data-parallel rank; use it as `DataLoader(stream, batch_size=None, num_workers=N)`.

    The batches do not depend on the number of workers, and those of all ranks together do not depend on the number of
    ranks: rank r gets samples r, r + world, … of each global batch.

    A damaged sample is skipped, named in the log and counted; the next sample of its shape stands in for it, the same
    on every rank that reads it, so that batches stay full and no rank waits for another.

    Args:
        source: the manifest, or what `Manifest.load` takes.
        order: made from the same manifest's `shapes()`.
        rank, world: the data-parallel rank, which all ranks of a sequence-parallel group share, and their number.
        start_step: the global step to start with: 0, or the number of steps that training has consumed.
        num_steps: how many steps to yield; None goes on without end.
        cache: a folder that keeps whole remote shards; None for no cache.
        max_bad: more damaged samples than this, over all workers of this rank, stop the run.

    Raises:
        DataError: here, when the arguments do not fit together; while iterating, when a shard cannot be reached or more
            than `max_bad` samples are damaged.
    """

    def __init__(
        self,
        source: Manifest | str | Path,
        order: BatchOrder,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
        cache: str | Path | None = None,
        max_bad: int = 16,
    ) -> None:
        super().__init__()
        self.manifest = source if isinstance(source, Manifest) else Manifest.load(source)
        if order.shapes != self.manifest.shapes():
            raise DataError(f"{self.manifest.home}: the batch order was made for another manifest; make it from this")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}, expected 0 to {world - 1} as world is {world}")
        if order.global_batch % world:
            hint = f"choose a multiple of {world}"
            raise DataError(f"global batch {order.global_batch} cannot be split over {world} ranks evenly; {hint}")
        if start_step < 0 or (num_steps is not None and num_steps < 0) or max_bad < 0:
            numbers = f"start_step is {start_step}, num_steps {num_steps} and max_bad {max_bad}"
            raise DataError(f"{numbers}, expected none below 0")
        self.order = order
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.num_steps = num_steps
        self.cache = None if cache is None else Path(cache)
        self.max_bad = max_bad
        # One flag a sample, shared by the workers, so that each damaged sample counts once.
        self._bad = torch.zeros(len(self.manifest.samples), dtype=torch.bool).share_memory_()

    @property
    def bad_samples(self) -> list[str]:
        """The keys of the damaged samples that were met so far, by any worker of this rank."""
        return [info.key for info, bad in zip(self.manifest.samples, self._bad.tolist(), strict=True) if bad]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        end = None if self.num_steps is None else self.start_step + self.num_steps
        steps: Iterable[int] = itertools.count(self.start_step + worker, workers)
        if end is not None:
            steps = range(self.start_step + worker, end, workers)
        # One thread, so that no file is read by two at once: it fetches bytes while this one decodes and collates.
        with SampleReader(self.manifest, self.cache) as reader, ThreadPoolExecutor(1) as pool:
            for _, group in itertools.groupby(self._parts(steps), key=lambda entry: entry[0]):
                yield from self._epoch(reader, pool, [(step, part) for _, step, part in group])

    def _parts(self, steps: Iterable[int]) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, step, this rank's samples) of each step."""
        for step in steps:
            yield self.order.epoch_of(step), step, self.order.part(step, self.rank, self.world)

    def _epoch(
        self, reader: SampleReader, pool: ThreadPoolExecutor, parts: list[tuple[int, list[int]]]
    ) -> Iterator[Batch]:
        """The batches of these steps, all of one epoch; a shard is closed after its last sample."""
        numbers = [number for _, part in parts for number in part]
        left = Counter(self.order.shard_of(number)[0] for number in numbers)
        coming = iter(numbers)
        fetches = deque(self._fetch(reader, pool, number) for number in itertools.islice(coming, AHEAD))
        for step, part in parts:
            samples = []
            for number in part:
                content = fetches.popleft().result()
                fetches += [self._fetch(reader, pool, after) for after in itertools.islice(coming, 1)]
                samples.append(self._sample(reader, pool, number, content))
                shard, _ = self.order.shard_of(number)
                left[shard] -= 1
                if left[shard] == 0:
                    reader.release(shard)
            yield collate(samples, step)

    def _fetch(self, reader: SampleReader, pool: ThreadPoolExecutor, number: int) -> Future[Tensor]:
        return pool.submit(reader.fetch, *self.order.shard_of(number))

    def _sample(self, reader: SampleReader, pool: ThreadPoolExecutor, number: int, content: Tensor) -> Sample:
        """The sample of these bytes, or what stands in for it where it is damaged."""
        wanted = number
        while True:
            try:
                return reader.decode(content, *self.order.shard_of(number))
            except BadSampleError as error:
                if not self._bad[number]:
                    self._bad[number] = True
                    log.warning("%s; skipped", error)
                count = int(self._bad.sum())
                number = self.order.next_alike(number)
                if count > self.max_bad or number == wanted:
                    limit = f"{count} damaged samples, at most {self.max_bad} are skipped"
                    raise DataError(f"{error} ({limit}; python -m data.check lists them all)") from error
            content = self._fetch(reader, pool, number).result()


def read_samples(source: Manifest | str | Path, limit: int | None = None) -> Iterator[Sample]:
    """The first `limit` samples (None: all) in the manifest's order, for evaluation sets and previews.

    Raises:
        DataError: as `Manifest.load`, or a sample is damaged or cannot be reached.
    """
    manifest = source if isinstance(source, Manifest) else Manifest.load(source)
    left = len(manifest.samples) if limit is None else limit
    with SampleReader(manifest) as reader:
        for number, shard in enumerate(manifest.shards):
            for place in range(min(max(left, 0), len(shard.samples))):
                yield reader.read(number, place)
            left -= len(shard.samples)
            reader.release(number)
