"""Writing a folder of shards: tars first, the manifest last.

A folder without a manifest is unfinished, whatever else lies in it. Equal samples give equal bytes: tar entries carry
no time and no user of the machine that made them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import safetensors.torch
from webdataset.writer import TarWriter

from data.errors import DataError
from data.files import commit, temporary, write_bytes
from data.manifest import EMPTY_PROMPT, FILE, Manifest, SampleInfo, ShardInfo
from data.sample import Prompt, Sample

LEFTOVER = re.compile(r"shard-\d{5}\.tar|\.(shard-\d{5}\.tar|manifest\.json|empty_prompt\.safetensors)\.tmp")


class _Hashed:
    """A file that is written in one pass, its SHA-256 and size taken on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.file.write(content)


class _OpenShard:
    """A shard while it is written: a tar under a temporary name and the samples in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples: list[SampleInfo] = []
        self.payload = 0
        self._file: BinaryIO = temporary(path).open("wb")
        self._hashed = _Hashed(self._file)
        self._tar = TarWriter(cast(BinaryIO, self._hashed), encoder=False, mtime=0.0, user="data", group="data")

    def write(self, entry: dict[str, Any], info: SampleInfo) -> None:
        self.payload += self._tar.write(entry)
        self.samples.append(info)

    def finish(self) -> ShardInfo:
        self._tar.close()
        commit(self._file, self.path)
        hashed = self._hashed
        return ShardInfo(self.path.name, tuple(self.samples), hashed.size, hashed.digest.hexdigest())

    def abort(self) -> None:
        # Left open, the tar would write its end when it is collected; it may fail here as it failed before.
        with contextlib.suppress(OSError):
            self._tar.close()
            self._file.close()
        temporary(self.path).unlink(missing_ok=True)


class ShardWriter:
    """Writes samples into `folder` as shard-00000.tar, shard-00001.tar, …, and the manifest when it is closed.

    As a context manager it closes at the end, and when an exception leaves the block it drops the shard in work and
    writes no manifest. What an unfinished run left in the folder is overwritten or removed. One writer a folder.

    Args:
        folder: made when missing.
        fps, encoder, latent, text, arguments: as in `Manifest`.
        empty_prompt: the embedding of the empty prompt.
        max_samples: at most this many samples a shard.
        max_bytes: at most this many bytes of samples a shard; a larger sample gets a shard of its own.

    Raises:
        DataError: when the folder is finished already, or a limit is below 1.
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
        for name, limit in (("max_samples", max_samples), ("max_bytes", max_bytes)):
            if limit < 1:
                raise DataError(f"{name} is {limit}, expected at least 1")
        self.folder = Path(folder)
        if (self.folder / FILE).exists():
            raise DataError(f"{self.folder / FILE}: the folder is finished already; choose another or delete this one")
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder}: is a file, expected a folder for shards; choose another path")
        empty_prompt.validate("the empty prompt")
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink()
        self._about: dict[str, Any] = {
            "fps": fps,
            "encoder": encoder,
            "latent": latent,
            "text": text,
            "arguments": arguments,
        }
        self._empty_prompt = empty_prompt
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._keys: set[str] = set()
        self._done: list[ShardInfo] = []
        self._open: _OpenShard | None = None

    def write(self, sample: Sample) -> None:
        """Add a sample.

        Raises:
            DataError: when it is not valid, or its key was written before.
        """
        entry = sample.to_entry()
        if sample.key in self._keys:
            raise DataError(f"sample {sample.key}: this key is in {self.folder} already, expected unique keys")
        self._keys.add(sample.key)
        size = len(entry["safetensors"]) + len(entry["json"])
        if self._open and (len(self._open.samples) >= self._max_samples or self._open.payload + size > self._max_bytes):
            self._finish_shard()
        if self._open is None:
            self._open = _OpenShard(self.folder / f"shard-{len(self._done):05d}.tar")
        channels, frames, height, width = sample.latent.shape
        self._open.write(entry, SampleInfo(sample.key, (channels, frames, height, width)))

    def close(self) -> Manifest:
        """Finish the last shard, write the empty prompt, then the manifest, and return it as loaded from disk.

        Raises:
            DataError: when no sample was written.
        """
        self._finish_shard()
        if not self._done:
            raise DataError(f"{self.folder}: no sample was written, expected at least one")
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._empty_prompt.tensors().items()}
        write_bytes(self.folder / EMPTY_PROMPT, safetensors.torch.save(tensors))
        Manifest(shards=tuple(self._done), **self._about).save(self.folder)
        return Manifest.load(self.folder)

    def abort(self) -> None:
        """Drop the shard in work; the folder stays unfinished."""
        if self._open is not None:
            self._open.abort()
            self._open = None

    def _finish_shard(self) -> None:
        if self._open is not None:
            self._done.append(self._open.finish())
            self._open = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
