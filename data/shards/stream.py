"""Streaming: from shards to batches in the exact order of a `BatchOrder`.

Worker w of W makes steps w, w + W, …; they are asked in turn, which restores the order. A step's samples are read where
they lie, one range of bytes each, so little is held beyond a batch and nothing is read to be skipped: where training
stands is one number, the steps it consumed, and `start_step` resumes there at once, with any number of workers and
ranks.

Workers are threads of the training process: reading, checking and stacking leave Python's lock, and a batch is handed
over as it is. Processes would pass 41 MB samples through shared memory, which is slower than reading them from the page
cache, and which containers keep small.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from data.errors import BadSampleError, DataError
from data.io.retry import give_up_on
from data.shards.batch import Batch, collate
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.reader import SampleReader
from data.shards.sample import Sample

AHEAD = 2  # batches that a worker makes before they are needed
log = logging.getLogger(__name__)


class LatentStream(Iterable[Batch]):
    """Batches of one data-parallel rank.

    The batches do not depend on the number of workers, and those of all ranks together do not depend on the number of
    ranks: rank r gets samples r, r + world, … of each global batch.

    A damaged sample is skipped and named in the log, once; the next sample of its shape stands in for it, the same
    on every rank that reads it, so that batches stay full and no rank waits for another.

    Args:
        source: the manifest, or what `Manifest.load` takes.
        order: made from the same manifest's `shapes()`.
        rank, world: the data-parallel rank, which all ranks of a sequence-parallel group share, and their number.
        start_step: the global step to start with: the order's first, or the number of steps that training has consumed.
        num_steps: how many steps to yield; None goes on without end.
        cache: a folder that keeps whole remote shards; None for no cache.
        max_bad: more damaged samples than this, over all workers of this rank, stop the run.
        workers: threads that make batches ahead; 0 makes each when it is asked for.
        pin_memory: batches lie in page-locked memory.

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
        start_step: int | None = None,
        num_steps: int | None = None,
        cache: str | Path | None = None,
        max_bad: int = 16,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.manifest = source if isinstance(source, Manifest) else Manifest.load(source)
        if order.shapes != self.manifest.shapes():
            raise DataError(f"{self.manifest.home}: the batch order was made for another manifest; make it from this")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}, expected 0 to {world - 1} as world is {world}")
        if order.global_batch % world:
            hint = f"choose a multiple of {world}"
            raise DataError(f"global batch {order.global_batch} cannot be split over {world} ranks evenly; {hint}")
        start_step = order.first if start_step is None else start_step
        if min(start_step - order.first, num_steps or 0, max_bad, workers) < 0:
            numbers = f"start_step is {start_step}, num_steps {num_steps}, max_bad {max_bad} and workers {workers}"
            raise DataError(f"{numbers}, expected none below 0, and no step before the order's first, {order.first}")
        self.order = order
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.num_steps = num_steps
        self.cache = None if cache is None else Path(cache)
        self.max_bad = max_bad
        self.workers = workers
        self.pin_memory = pin_memory
        self._bad: set[int] = set()
        self._lock = threading.Lock()  # of what the workers share: `_bad` and `order`

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            yield from self._batches(0, 1)
            return
        with ExitStack() as stack:
            lines = [stack.enter_context(_Worker(self._batches(w, self.workers))) for w in range(self.workers)]
            for line in itertools.cycle(lines):
                batch = line.next()
                if batch is None:
                    return
                yield batch

    def taken(self, step: int) -> dict[tuple[int, ...], int]:
        """As `BatchOrder.taken`, beside the workers."""
        with self._lock:
            return self.order.taken(step)

    def _batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """The batches that one worker makes."""
        end = None if self.num_steps is None else self.start_step + self.num_steps
        steps: Iterable[int] = itertools.count(self.start_step + worker, workers)
        if end is not None:
            steps = range(self.start_step + worker, end, workers)
        with SampleReader(self.manifest, self.cache) as reader:
            for _, group in itertools.groupby(steps, key=self.order.epoch_of):
                with self._lock:  # the order keeps the last epochs in mind
                    parts = [(step, self.order.part(step, self.rank, self.world)) for step in group]
                for batch in self._epoch(reader, parts):
                    yield batch.pin_memory() if self.pin_memory else batch

    def _epoch(self, reader: SampleReader, parts: list[tuple[int, list[int]]]) -> Iterator[Batch]:
        """The batches of these steps, all of one epoch; a shard is closed after its last sample."""
        left = Counter(self.order.shard_of(number)[0] for _, part in parts for number in part)
        for step, part in parts:
            samples = []
            for number in part:
                samples.append(self._sample(reader, number))
                shard, _ = self.order.shard_of(number)
                left[shard] -= 1
                # What stood in for a damaged sample may lie in a shard that is not to come, or that is over.
                reader.release_but(left)
            yield collate(samples, step)

    def _sample(self, reader: SampleReader, number: int) -> Sample:
        """The sample of this number, or what stands in for it where it is damaged."""
        wanted = number
        while True:
            try:
                return reader.read(*self.order.shard_of(number))
            except BadSampleError as error:
                with self._lock:
                    if number not in self._bad:
                        self._bad.add(number)
                        log.warning("%s; skipped", error)
                    count = len(self._bad)
                number = self.order.next_alike(number)
                why = None
                if count > self.max_bad:
                    skipped = "1 is" if self.max_bad == 1 else f"{self.max_bad} are"
                    why = f"{count} damaged sample{'s' * (count != 1)}, at most {skipped} skipped"
                elif number == wanted:
                    why = f"every sample of shape {list(self.manifest.samples[number].shape)} is damaged"
                if why is not None:
                    raise DataError(f"{error} ({why}; python -m data.check lists them all)") from error


class _Worker:
    """A thread that runs an iterator `AHEAD` steps ahead."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self._unwanted = threading.Event()
        self._pool = ThreadPoolExecutor(1, "loader", initializer=give_up_on, initargs=(self._unwanted,))
        self._coming: deque[Future[Batch | None]] = deque(self._submit() for _ in range(AHEAD))

    def _submit(self) -> Future[Batch | None]:
        return self._pool.submit(next, self._batches, None)

    def next(self) -> Batch | None:
        """The next batch, or None after the last one; raises what making it raised."""
        batch = self._coming.popleft().result()
        self._coming.append(self._submit())
        return batch

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._unwanted.set()  # a server that does not answer is not waited for
        self._pool.submit(self._batches.close)  # type: ignore[attr-defined]
        for future in self._coming:
            future.cancel()
        self._pool.shutdown()


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
