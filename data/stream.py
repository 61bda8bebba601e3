"""Streaming: from shards to batches in the exact order of a `BatchOrder`.

Each worker of each rank walks through the shards of an epoch in the epoch's order, opens those that hold samples of its
own steps, decodes only these, and yields a step as soon as it is complete. It holds at most its share of one shuffle
window and of the buckets that are not full yet. Worker w of W makes steps w, w + W, …; a DataLoader asks its workers in
turn, which restores the order. So where training stands is one number, the steps it consumed, and `start_step` resumes
there with any number of workers and ranks.
"""

from __future__ import annotations

import itertools
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList
from webdataset.tariterators import tarfile_to_samples

from data.batch import Batch, collate
from data.errors import DataError
from data.manifest import Manifest, Shape
from data.order import BatchOrder
from data.sample import Sample


class LatentStream(IterableDataset[Batch]):
    """Batches of one data-parallel rank; use it as `DataLoader(stream, batch_size=None, num_workers=N)`.

    The batches do not depend on the number of workers, and those of all ranks together do not depend on the number of
    ranks: rank r gets samples r, r + world, … of each global batch.

    Args:
        source: the manifest, or the folder of it. For shards that lie elsewhere: `Manifest.load(folder, urls=…)`.
        order: made from the same manifest's `shapes()`.
        rank, world: the data-parallel rank, which all ranks of a sequence-parallel group share, and their number.
        start_step: the global step to start with: 0, or the number of steps that training has consumed.
        num_steps: how many steps to yield; None goes on without end.

    Raises:
        DataError: here, when the arguments do not fit together; while iterating, when a shard cannot be read or a
            sample is not valid, naming the shard and the key.
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
    ) -> None:
        super().__init__()
        self.manifest = source if isinstance(source, Manifest) else Manifest.load(source)
        if order.shapes != self.manifest.shapes():
            raise DataError(f"{self.manifest.folder}: the batch order was made for another manifest; make it from this")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}, expected 0 to {world - 1} as world is {world}")
        if order.global_batch % world:
            hint = f"choose a multiple of {world}"
            raise DataError(f"global batch {order.global_batch} cannot be split over {world} ranks evenly; {hint}")
        if start_step < 0 or (num_steps is not None and num_steps < 0):
            raise DataError(f"start_step is {start_step} and num_steps {num_steps}, expected neither below 0")
        self.order = order
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.num_steps = num_steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        end = None if self.num_steps is None else self.start_step + self.num_steps
        steps: Iterable[int] = itertools.count(self.start_step + worker, workers)
        if end is not None:
            steps = range(self.start_step + worker, end, workers)
        for epoch, group in itertools.groupby(steps, key=lambda step: step // self.order.batches_per_epoch):
            yield from self._epoch(epoch, list(group))

    def _epoch(self, epoch: int, steps: list[int]) -> Iterator[Batch]:
        """The batches of these steps, all of one epoch, in their order."""
        parts = deque((step, self.order.part(step, self.rank, self.world)) for step in steps)
        wanted = {sample for _, part in parts for sample in part}
        held: dict[int, Sample] = {}
        for shard in self.order.shards(epoch):
            infos = zip(self.order.samples_of(shard), self.manifest.shards[shard].samples, strict=True)
            ours = {info.key: (number, info.shape) for number, info in infos if number in wanted}
            if not ours:
                continue
            shapes = {key: shape for key, (_, shape) in ours.items()}
            for sample in read_shard(self.manifest.urls[shard], shapes):
                held[ours[sample.key][0]] = sample
                while parts and all(number in held for number in parts[0][1]):
                    step, part = parts.popleft()
                    yield collate([held.pop(number) for number in part], step)


def read_samples(source: Manifest | str | Path, limit: int | None = None) -> Iterator[Sample]:
    """The first `limit` samples (None: all) in the manifest's order, for evaluation sets and previews.

    Raises:
        DataError: as `Manifest.load` and `LatentStream`.
    """
    manifest = source if isinstance(source, Manifest) else Manifest.load(source)
    left = len(manifest.samples) if limit is None else limit
    for url, shard in zip(manifest.urls, manifest.shards, strict=True):
        shapes = {info.key: info.shape for info in shard.samples[: max(left, 0)]}
        if shapes:
            yield from read_shard(url, shapes)
        left -= len(shapes)


def read_shard(url: str, wanted: Mapping[str, Shape]) -> Iterator[Sample]:
    """The wanted samples of one shard, in the order of the tar; the rest is skipped unread and undecoded.

    Args:
        url: anything that webdataset opens: a path, `pipe:…`, `http://…`.
        wanted: the keys, and the latent's shape that each must have.

    Raises:
        DataError: naming the shard, and the key where one is known.
    """
    missing = dict(wanted)
    pipeline = DataPipeline(
        SimpleShardList([url]),
        # Before decoding and even before reading: a shard's tar is mostly other ranks' and workers' samples.
        tarfile_to_samples(select_files=lambda name: name.partition(".")[0] in wanted),
    )
    entries: Iterator[dict[str, Any]] = iter(pipeline)
    while missing:
        expected = next(iter(missing))
        try:
            entry = next(entries, None)
        except (OSError, tarfile.TarError, ValueError) as error:
            hint = "check that it can be read; if it can, make it anew"
            where = f"reading failed at or after sample {expected}"
            raise DataError(f"{url}: {where} ({_reason(error)}); {hint}") from error
        if entry is None:
            raise DataError(f"{url}: ends without sample {expected}, which the manifest lists; make the folder anew")
        try:
            sample = Sample.from_entry(entry)
        except DataError as error:
            raise DataError(f"{url}: {error}") from error
        if sample.key not in missing:
            raise DataError(f"{url}: sample {sample.key} stands in it twice, expected once; make the folder anew")
        found, expected_shape = tuple(sample.latent.shape), missing.pop(sample.key)
        if found != expected_shape:
            shapes = f"latent has shape {list(found)}, the manifest says {list(expected_shape)}"
            raise DataError(f"{url}: sample {sample.key}: {shapes}; make the folder anew")
        yield sample


def _reason(error: Exception) -> str:
    """What went wrong, without the arguments that webdataset appends to other libraries' exceptions."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]).partition(" @ ")[0] if error.args else type(error).__name__
