"""Streaming: from shards to batches in the exact order of a `BatchOrder`, as a `webdataset` pipeline.

    exact-order reader (`data.shards.ordered_samples`)  →  the user's stages (`data.shards.stages`)  →  batches

The reader is a source like any other of a `wds.DataPipeline`, so that stages are those that webdataset knows. Each
stage turns one sample into one, so that the number of steps consumed is where training stands, whatever the stages do:
`start_step` resumes there at once, with any number of workers and ranks. A step's samples are read where they lie, one
range of bytes each, so that little is held beyond a batch and nothing is read to be skipped.

Worker w of W runs a pipeline of its own, of steps w, w + W, …; the workers' batches are taken in turn, which restores
the order. Workers are threads of the training process: reading, checking and stacking release Python's lock, and a
batch is handed over as it is. Processes would pass 41 MB samples through shared memory, which is slower than reading
them from the page cache, and which containers keep small.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import webdataset as wds

from data.errors import DataError
from data.io.retry import give_up_on
from data.shards.batch import Batch, collate
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.ordered_samples import OrderedSamples
from data.shards.reader import SampleReader
from data.shards.sample import Sample
from data.shards.stages import Stage

AHEAD = 2  # batches that a worker makes before they are needed


class LatentStream(Iterable[Batch]):
    """Batches of one data-parallel rank.

    The batches do not depend on the number of workers, and those of all ranks together do not depend on the number of
    ranks: rank r gets samples r, r + world, … of each global batch.

    Damaged samples are replaced, see `OrderedSamples`.

    Args:
        source: the manifest, or what `Manifest.load` takes.
        order: made from the same manifest's `shapes()`.
        rank, world: the data-parallel rank, which all ranks of a sequence-parallel group share, and their number.
        start_step: the global step to start with: the order's first, or the number of steps that training has consumed.
        num_steps: how many steps to yield; None goes on without end.
        cache: a folder that keeps whole remote shards; None for no cache.
        max_bad: more damaged samples than this, over all workers of this rank, stop the run.
        stages: applied to each sample, one after the other, in the workers' threads.
        workers: threads that make batches ahead; 0 makes each when it is asked for.
        pin_memory: batches lie in page-locked memory.

    Raises:
        DataError: here, when the arguments do not fit together; while iterating, when a shard cannot be reached, more
            than `max_bad` samples are damaged, or a stage fails.
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
        stages: Sequence[Stage] = (),
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
        self.world = world
        self.start_step = start_step
        self.num_steps = num_steps
        self.cache = None if cache is None else Path(cache)
        self.stages = tuple(stages)
        self.workers = workers
        self.pin_memory = pin_memory
        self._samples = OrderedSamples(self.manifest, order, rank=rank, world=world, max_bad=max_bad)

    def __iter__(self) -> Iterator[Batch]:
        if not self.workers:
            yield from self.batches(0, 1)
            return
        with ExitStack() as stack:
            lines = [stack.enter_context(Worker(self.batches(w, self.workers))) for w in range(self.workers)]
            for line in itertools.cycle(lines):
                batch = line.next()
                if batch is None:
                    return
                yield batch

    def taken(self, step: int) -> dict[tuple[int, ...], int]:
        """As `BatchOrder.taken`, beside the workers."""
        return self._samples.taken(step)

    def batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """The batches that one worker makes."""
        end = sys.maxsize if self.num_steps is None else self.start_step + self.num_steps
        steps = range(self.start_step + worker, end, workers)
        with SampleReader(self.manifest, self.cache) as reader:
            yield from wds.DataPipeline(
                functools.partial(self._samples.read, reader, steps),
                *[wds.map(stage) for stage in self.stages],
                batched(steps, self.order.global_batch // self.world),
                wds.map(Batch.pin_memory) if self.pin_memory else None,
            )


@wds.pipelinefilter
def batched(samples: Iterator[Sample], steps: Iterable[int], size: int) -> Iterator[Batch]:
    """A stage that stacks `size` samples into a batch for each of the steps.

    webdataset's own gives a batch only after the sample that follows it has been read.
    """
    for step in steps:
        group = list(itertools.islice(samples, size))
        if not group:
            return
        yield collate(group, step)


class Worker:
    """A thread that runs an iterator `AHEAD` steps ahead."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self._unwanted = threading.Event()
        self._pool = ThreadPoolExecutor(1, "loader", initializer=give_up_on, initargs=(self._unwanted,))
        self._coming: deque[Future[Batch | None]] = deque(self._submit() for _ in range(AHEAD))

    def _submit(self) -> Future[Batch | None]:
        return self._pool.submit(next, self.batches, None)

    def next(self) -> Batch | None:
        """The next batch, or None after the last one; raises what making it raised."""
        batch = self._coming.popleft().result()
        self._coming.append(self._submit())
        return batch

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._unwanted.set()  # a server that does not answer is not waited for
        self._pool.submit(self.batches.close)  # type: ignore[attr-defined]
        for future in self._coming:
            future.cancel()
        self._pool.shutdown()


def read_samples(
    source: Manifest | str | Path, limit: int | None = None, stages: Sequence[Stage] = ()
) -> Iterator[Sample]:
    """The first `limit` samples (None: all) in the manifest's order, for evaluation sets and previews.

    Raises:
        DataError: as `Manifest.load`, a sample is damaged or cannot be reached, or a stage fails.
    """
    manifest = source if isinstance(source, Manifest) else Manifest.load(source)
    left = len(manifest.samples) if limit is None else limit
    with SampleReader(manifest) as reader:
        for number, shard in enumerate(manifest.shards):
            for place in range(min(max(left, 0), len(shard.samples))):
                sample = reader.read(number, place)
                for stage in stages:
                    sample = stage(sample)
                yield sample
            left -= len(shard.samples)
            reader.release(number)
