"""Writing a folder of shards: tars first, the manifest last.

A folder without a manifest is unfinished, whatever else lies in it; what an unfinished run began is overwritten, and
shards that none is known to have begun are never removed (`data.shards.begun`). Equal samples give equal bytes: tar
entries carry no time and no user of the machine that made them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import re
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import safetensors.torch

from data.errors import DataError, naming
from data.io.files import commit, temporary, write_bytes
from data.shards.begun import Begun, refuse_shards
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest, check_fps
from data.shards.sample import Prompt, Sample
from data.shards.shard_info import SampleInfo, ShardInfo

_BEGUN = ".begun"
_TEMPORARY = re.compile(r"\.(manifest\.json|empty_prompt\.safetensors|rejected\.jsonl|videos\.json)\.[0-9a-f]+\.tmp")

PARTS = ("json", "safetensors")


class _Hashed:
    """A file that is written in one pass: its SHA-256 and size on the way, and the CRC-32 since that was set to 0."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.crc32 = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.crc32 = zlib.crc32(content, self.crc32)
        self.size += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.size


class OpenShard:
    """A shard while it is written: a tar under a temporary name and the samples in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.since = time.monotonic()
        self.samples: list[SampleInfo] = []
        self._file: BinaryIO = temporary(path).open("wb")
        self._hashed = _Hashed(self._file)
        self._tar = tarfile.open(fileobj=cast(BinaryIO, self._hashed), mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def size_with(self, entry: dict[str, Any]) -> int:
        """The finished file's bytes with one more entry, in tar's blocks and records."""
        blocks = sum(1 + math.ceil(len(entry[part]) / tarfile.BLOCKSIZE) for part in PARTS)
        size = self._hashed.size + (blocks + 2) * tarfile.BLOCKSIZE
        return math.ceil(size / tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def write(self, sample: Sample, entry: dict[str, Any]) -> None:
        start, self._hashed.crc32 = self._hashed.size, 0
        for part in PARTS:
            member = tarfile.TarInfo(f"{entry['__key__']}.{part}")
            member.size, member.mode, member.uname, member.gname = len(entry[part]), 0o444, "data", "data"
            self._tar.addfile(member, io.BytesIO(entry[part]))
        channels, frames, height, width = sample.latent.shape
        shape, length = (channels, frames, height, width), self._hashed.size - start
        self.samples.append(SampleInfo(sample.key, shape, start, length, self._hashed.crc32))

    def finish(self) -> ShardInfo:
        self._tar.close()
        commit(self._file, self.path)
        hashed = self._hashed
        return ShardInfo(self.path.name, tuple(self.samples), hashed.size, hashed.digest.hexdigest())

    def abort(self) -> None:
        try:
            # Left open, both would write their ends when they are collected; they may fail here as they failed before.
            for file in (self._tar, self._file):
                with contextlib.suppress(OSError):
                    file.close()
        finally:
            temporary(self.path).unlink(missing_ok=True)


class TarShards:
    """Writes samples into one tar after the other; each is whole on disk before it is announced.

    Args:
        folder: where they go; it has to be there.
        name: the file name of shard n, n from 0.
        finished: called with each shard that is whole on disk under its name.
        max_samples: at most this many samples a shard.
        max_bytes: at most this many bytes a shard; a larger sample gets a shard of its own.
        max_seconds: a shard is finished with the first sample after this time: what a kill costs at most.

    Raises:
        DataError: when a limit is below 1.
    """

    def __init__(
        self,
        folder: Path,
        name: Callable[[int], str],
        finished: Callable[[ShardInfo], None],
        *,
        max_samples: int,
        max_bytes: int,
        max_seconds: float = math.inf,
    ) -> None:
        for limit, value in (("max_samples", max_samples), ("max_bytes", max_bytes)):
            if value < 1:
                raise DataError(f"{limit} is {value}, expected at least 1")
        self._folder, self._name, self._finished = folder, name, finished
        self._max_samples, self._max_bytes, self._max_seconds = max_samples, max_bytes, max_seconds
        self._keys: set[str] = set()
        self._count = 0
        self._open: OpenShard | None = None

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            DataError: when it is not valid, or its key was written before.
        """
        entry = sample.to_entry()
        if sample.key in self._keys:
            raise DataError(f"sample {sample.key}: this key is in {self._folder} already, expected unique keys")
        self._keys.add(sample.key)
        if self._open and (
            len(self._open.samples) >= self._max_samples or self._open.size_with(entry) > self._max_bytes
        ):
            self.flush()
        if self._open is None:
            path = self._folder / self._name(self._count)
            with naming(path):
                self._open = OpenShard(path)
            self._count += 1
        with naming(self._open.path):
            self._open.write(sample, entry)
        if time.monotonic() - self._open.since >= self._max_seconds:
            self.flush()

    def flush(self) -> None:
        """Finish the shard in work, if there is one."""
        if self._open is not None:
            shard, self._open = self._open, None
            with naming(shard.path):
                finished = shard.finish()
            self._finished(finished)

    def abort(self) -> None:
        """Drop the shard in work."""
        if self._open is not None:
            self._open.abort()
            self._open = None


class ShardWriter:
    """Writes samples into `folder` as shard-00000.tar, shard-00001.tar, …, and the manifest when it is closed.

    As a context manager it closes at the end, and when an exception leaves the block it drops the shard in work and
    writes no manifest. What an unfinished writer began in the folder is removed. One writer a folder.

    Args:
        folder: made when missing.
        fps, encoder, latent, text, arguments: as in `Manifest`.
        empty_prompt: the embedding of the empty prompt.
        max_samples, max_bytes: as in `TarShards`.

    Raises:
        DataError: when the folder is finished already, holds shards that no writer is known to have begun, fps is no
            pace, or a limit is below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fps: float,
        encoder: str,
        latent: str,
        text: str,
        arguments: dict[str, Any],
        empty_prompt: Prompt,
        max_samples: int = 1024,
        max_bytes: int = 1 << 30,
    ) -> None:
        check_fps(fps)
        self.folder = Path(folder)
        self._done: list[ShardInfo] = []
        self._shards = TarShards(
            self.folder, self._named, self._done.append, max_samples=max_samples, max_bytes=max_bytes
        )
        if (self.folder / FILE).exists():
            raise DataError(f"{self.folder / FILE}: the folder is finished already; choose another or delete this one")
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder}: is a file, expected a folder for shards; choose another path")
        empty_prompt.validate("the empty prompt")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begun = Begun(self.folder / _BEGUN)
        refuse_shards(self.folder, self._begun.names())
        self._begun.clear(self.folder)
        remove_leftovers(self.folder)
        self._about: dict[str, Any] = {
            "fps": fps,
            "encoder": encoder,
            "latent": latent,
            "text": text,
            "arguments": arguments,
        }
        self._empty_prompt = empty_prompt

    def _named(self, number: int) -> str:
        """The name of a shard that is about to be made."""
        name = f"shard-{number:05d}.tar"
        self._begun.add(name)
        return name

    def write(self, sample: Sample) -> None:
        """Add a sample, see `TarShards.write`."""
        self._shards.write(sample)

    def close(self) -> Manifest:
        """Finish the last shard, write the empty prompt, then the manifest, and return it as loaded from disk.

        Raises:
            DataError: when no sample was written.
        """
        self._shards.flush()
        if not self._done:
            raise DataError(f"{self.folder}: no sample was written, expected at least one")
        finish_folder(self.folder, Manifest(shards=tuple(self._done), **self._about), self._empty_prompt)
        self._begun.forget()
        return Manifest.load(self.folder)

    def abort(self) -> None:
        """Drop the shard in work; the folder stays unfinished."""
        self._shards.abort()
        if not self._done:
            self._begun.forget()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill left of files beside the shards while they were written."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def finish_folder(folder: Path, manifest: Manifest, empty_prompt: Prompt) -> None:
    """Write the empty prompt, then the manifest, which says that the folder is whole."""
    tensors = {name: tensor.contiguous().clone() for name, tensor in empty_prompt.tensors().items()}
    with naming(folder / EMPTY_PROMPT):
        write_bytes(folder / EMPTY_PROMPT, safetensors.torch.save(tensors))
    with naming(folder / FILE):
        manifest.save(folder)
