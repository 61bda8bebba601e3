"""The first stage of the stream: samples in the exact order of a `BatchOrder`, the damaged ones replaced."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

from data.errors import BadSampleError, DataError
from data.shards.manifest import Manifest
from data.shards.order import BatchOrder
from data.shards.reader import SampleReader
from data.shards.sample import Sample

log = logging.getLogger(__name__)


class OrderedSamples:
    """The samples of one data-parallel rank, step after step; its threads share it.

    A damaged sample is skipped and named in the log, once; the next sample of its shape stands in for it, the same
    on every rank that reads it, so that batches stay full and no rank waits for another.

    Args:
        manifest: what lies where.
        order: made from the same manifest's `shapes()`.
        rank, world: the data-parallel rank and their number.
        max_bad: more damaged samples than this, over all threads, stop the run.
    """

    def __init__(self, manifest: Manifest, order: BatchOrder, *, rank: int, world: int, max_bad: int) -> None:
        self._manifest, self._order = manifest, order
        self._rank, self._world, self._max_bad = rank, world, max_bad
        self._bad: set[int] = set()
        self._lock = threading.Lock()  # of what the threads share: `_bad` and `_order`

    def taken(self, step: int) -> dict[tuple[int, ...], int]:
        """As `BatchOrder.taken`, while other threads read."""
        with self._lock:
            return self._order.taken(step)

    def read(self, reader: SampleReader, steps: Iterable[int]) -> Iterator[Sample]:
        """The samples of these global steps, as many for each; a shard is closed after its last sample of an epoch.

        Raises:
            DataError: a shard cannot be reached, or too many samples are damaged.
        """
        for _, group in itertools.groupby(steps, key=self._order.epoch_of):
            with self._lock:  # the order remembers the last epochs
                numbers = [number for step in group for number in self._order.part(step, self._rank, self._world)]
            left = Counter(self._order.shard_of(number)[0] for number in numbers)
            for number in numbers:
                sample = self._sample(reader, number)
                left[self._order.shard_of(number)[0]] -= 1
                # What stood in for a damaged sample may lie in a shard that is not to come, or that is over.
                reader.release_but(left)
                yield sample

    def _sample(self, reader: SampleReader, number: int) -> Sample:
        """The sample of this number, or what stands in for it where it is damaged."""
        wanted = number
        while True:
            try:
                return reader.read(*self._order.shard_of(number))
            except BadSampleError as error:
                with self._lock:
                    if number not in self._bad:
                        self._bad.add(number)
                        log.warning("%s; skipped", error)
                    count = len(self._bad)
                number = self._order.next_alike(number)
                why = None
                if count > self._max_bad:
                    skipped = "1 is" if self._max_bad == 1 else f"{self._max_bad} are"
                    why = f"{count} damaged sample{'s' * (count != 1)}, at most {skipped} skipped"
                elif number == wanted:
                    why = f"every sample of shape {list(self._manifest.samples[number].shape)} is damaged"
                if why is not None:
                    raise DataError(f"{error} ({why}; python -m data.check lists them all)") from error
