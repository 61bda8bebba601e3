"""One sample out of a shard: its bytes, and no others."""

from __future__ import annotations

import contextlib
import mmap
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from data.errors import BadSampleError, DataError
from data.io.remote import ShardFile, open_shard
from data.shards.entry_map import EntryMap
from data.shards.manifest import Manifest
from data.shards.sample import Sample
from data.shards.shard_info import SampleInfo

HUGE_PAGE = 2 << 20
MOST_OPEN = 32  # files; a shuffle window may span hundreds of shards, and a process may often have 1,024 open


class SampleReader:
    """Reads samples of a manifest by number; shards stay open until they are released.

    Of files that are opened again in no time, those of this machine, the least recently read is closed when
    `MOST_OPEN` are open.

    Args:
        manifest: what lies where.
        cache: a folder that keeps whole remote shards; None for no cache.
    """

    def __init__(self, manifest: Manifest, cache: Path | None = None) -> None:
        self._manifest = manifest
        self._cache = cache
        self._open: dict[int, ShardFile] = {}

    def fetch(self, shard: int, place: int) -> Tensor:
        """The bytes of the sample at a place of a shard, uint8; fewer than there should be where the shard ends.

        Raises:
            DataError: the shard cannot be reached.
        """
        about = self._manifest.shards[shard]
        info = about.samples[place]
        file = self._open.pop(shard, None) or open_shard(self._manifest.urls[shard], about.sha256, self._cache)
        self._open[shard] = file  # last of all
        light = [number for number, each in self._open.items() if each.light]
        if len(light) > MOST_OPEN:
            self.release(light[0])
        content = _room(info.bytes)
        return content[: file.read_into(info.offset, content.numpy().data)]

    def decode(self, content: Tensor, shard: int, place: int) -> Sample:
        """The sample whose bytes these are, checked against schema and manifest.

        Raises:
            BadSampleError: they are not those of the sample that the manifest lists.
        """
        try:
            return decode(content, self._manifest.shards[shard].samples[place], self._manifest.maps[shard])
        except DataError as error:
            raise BadSampleError(f"{self._manifest.urls[shard]}: {error}") from error

    def read(self, shard: int, place: int) -> Sample:
        """`fetch` and `decode`."""
        return self.decode(self.fetch(shard, place), shard, place)

    def release(self, shard: int) -> None:
        """Close a shard."""
        if shard in self._open:
            self._open.pop(shard).close()

    def release_but(self, wanted: Mapping[int, int]) -> None:
        """Close the shards of which no sample is wanted any more.

        Args:
            wanted: how many, by shard.
        """
        for shard in [shard for shard in self._open if not wanted.get(shard)]:
            self.release(shard)

    def close(self) -> None:
        """Close all shards."""
        self.release_but({})

    def __enter__(self) -> SampleReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _room(size: int) -> Tensor:
    """Memory for so many bytes, uint8, in pages of 2 MB where Linux has them: touching 4 kB pages takes as long again
    as the reading itself."""
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)  # unmapped with the last tensor that is a view of it


def decode(content: Tensor, info: SampleInfo, entries: EntryMap | None = None) -> Sample:
    """A sample from its bytes in a tar, uint8; in our own tars with headers, and its tensors are views of them.

    Args:
        content: from `info.offset` on.
        info: the sample in the manifest.
        entries: of tars that somebody else wrote, as `Manifest.map`.

    Raises:
        DataError: naming the key: the bytes are too few, no entries of a tar or those of another sample, the sample is
            not valid, or its latent's shape is not that of the manifest.
    """
    where = f"sample {info.key}"
    if len(content) < info.bytes:
        raise DataError(f"{where}: the shard ends {info.bytes - len(content)} bytes before it does; copy it again")
    if entries is not None and info.parts is not None:
        found = entries.sample(info.key, {name: content[first : first + size] for name, first, size in info.parts})
        return _shaped(found, info)
    parts: dict[str, Tensor | str] = {"__key__": info.key}
    while len(content):
        header = content[: tarfile.BLOCKSIZE].numpy().tobytes()
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, ValueError) as error:
            raise DataError(f"{where}: no entry of a tar where the manifest says ({error}); copy it again") from error
        end = tarfile.BLOCKSIZE + member.size
        key, _, part = member.name.partition(".")
        if key != info.key or not 0 <= member.size <= len(content) - tarfile.BLOCKSIZE:
            raise DataError(f"{where}: found {member.name} of {member.size} bytes in its place; copy it again")
        parts[part] = content[tarfile.BLOCKSIZE : end]
        content = content[tarfile.BLOCKSIZE + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE :]
    return _shaped(Sample.from_entry(parts), info)


def _shaped(sample: Sample, info: SampleInfo) -> Sample:
    """The sample, cut to the frames that are wanted, or a DataError where its latent's shape is not the manifest's."""
    channels, frames, height, width = info.shape
    stored = (channels, info.stored or frames, height, width)
    if tuple(sample.latent.shape) != stored:
        shapes = f"latent has shape {list(sample.latent.shape)}, the manifest says {list(stored)}"
        raise DataError(f"sample {info.key}: {shapes}; make the folder anew")
    return sample if info.stored is None else sample.first_frames(frames)
