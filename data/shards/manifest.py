"""What a folder of shards says about itself: `manifest.json`, with `empty_prompt.safetensors` beside it."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from data.errors import DataError
from data.io.files import write_bytes
from data.io.remote import read_all, scheme_of
from data.shards.entry_map import EntryMap
from data.shards.sample import Prompt
from data.shards.shard_info import SampleInfo, Shape, ShardInfo, field_of

log = logging.getLogger(__name__)

FILE = "manifest.json"
EMPTY_PROMPT = "empty_prompt.safetensors"
REJECTED = "rejected.jsonl"
VERSION = 2
MAPPED_VERSION = 3  # of a manifest with a map


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards.

    Attributes:
        shards: the shards; samples are numbered through them in this order.
        fps: frames a second of the clips, before the encoder.
        encoder: fingerprint of what made latents and text; data of different fingerprints do not mix.
        latent: what the latents are, in words.
        text: what the text tensors are, in words.
        arguments: the arguments that made the folder, as JSON.
        videos: of how many files it was made, bad ones included; None where it was not made of files.
        rejected: how many of them are bad; None where it was not made of files.
        map: which entries of the tars hold which fields, where somebody else wrote them (`data.index`); None in ours.
        home: where it was loaded from, see `load`; not part of the file.
        urls: where each shard is read from, see `data.io.remote`; not part of the file.
        maps: the map of each shard's folder, as views of several folders have several; not part of the file.
        weights: how often the samples of each shard come in an epoch; none is once. Not part of the file.
    """

    shards: tuple[ShardInfo, ...]
    fps: float
    encoder: str
    latent: str
    text: str
    arguments: dict[str, Any]
    videos: int | None = None
    rejected: int | None = None
    map: EntryMap | None = None
    home: str = field(default="", compare=False)
    urls: tuple[str, ...] = field(default=(), compare=False)
    maps: tuple[EntryMap | None, ...] = field(default=(), compare=False)
    weights: tuple[float, ...] = field(default=(), compare=False)

    @property
    def folder(self) -> Path:
        """The local folder that it was loaded from."""
        return Path(self.home)

    @property
    def samples(self) -> list[SampleInfo]:
        """All samples in their numbering."""
        return [sample for shard in self.shards for sample in shard.samples]

    def shapes(self) -> list[list[Shape]]:
        """For each shard the shapes of its samples: what `BatchOrder` takes."""
        return [[sample.shape for sample in shard.samples] for shard in self.shards]

    def load_empty_prompt(self) -> Prompt:
        """The empty prompt's embedding, for caption dropout and guidance.

        Raises:
            DataError: when the file is missing or is not a prompt.
        """
        path = locate(self.home, EMPTY_PROMPT)
        try:
            tensors = safetensors.torch.load(read_all(path))
        except (SafetensorError, ValueError, KeyError) as error:
            if isinstance(error, DataError):
                raise DataError(f"{error}; it holds the empty prompt's embedding") from error
            raise DataError(f"{path}: cannot be read ({error}); make the folder anew") from error
        return Prompt.from_tensors(tensors, path)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically, one line a shard."""
        head = {
            "format": "latent-shards",
            "version": VERSION if self.map is None else MAPPED_VERSION,
            "fps": self.fps,
            "encoder": self.encoder,
            "latent": self.latent,
            "text": self.text,
            "arguments": self.arguments,
            "samples": len(self.samples),
            **{name: n for name, n in (("videos", self.videos), ("rejected", self.rejected)) if n is not None},
        }
        if self.map is not None:
            head["map"] = self.map.places
        lines = ",\n  ".join(json.dumps(shard.to_json()) for shard in self.shards)
        text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'
        write_bytes(folder / FILE, text.encode())

    @classmethod
    def load(cls, source: str | Path, *, missing: bool = False) -> Manifest:
        """Read a manifest, and check that local shards are there.

        Args:
            source: the folder or the JSON file itself; or the folder's URL, which may be http(s)://, anything that
                fsspec opens, or `pipe:` with a command that has {} for a file's name, such as
                `pipe:aws s3 cp s3://bucket/shards/{} -`.
            missing: local shards may be missing.

        A local shard of another size than it should have is named in the log, and read as far as it goes.

        Raises:
            DataError: no manifest, not a manifest, wrong version, a bad field, or a shard missing.
        """
        home = str(source)
        if not home:
            raise DataError("the path of the shards is empty, expected a folder or URL; is a variable not set?")
        if scheme_of(home) == "pipe" and "{}" not in home:
            raise DataError(f"{home}: names no file, expected {{}} in the command where a file's name goes")
        local = scheme_of(home) == "file"
        if home.endswith(".json") and scheme_of(home) != "pipe":
            home = home.rpartition("/")[0] or "."
        if local:
            # A run may change its working directory.
            home = str(Path(home.removeprefix("file://")).absolute())
        path = locate(home, FILE)
        if local and not Path(path).is_file():
            hint = "the folder is unfinished or not one of shards; make it first, or correct the path"
            raise DataError(f"{path}: no manifest; {hint}")
        try:
            raw = json.loads(read_all(path))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError) or getattr(error.__cause__, "code", None) == 404:
                hint = "correct the address, or wait until data.prepare has uploaded it, which it does last"
                raise DataError(f"{path}: no manifest; {hint}") from error
            raise
        except ValueError as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); make the folder anew") from error
        manifest = cls._parse(raw, home, path)
        for shard in manifest.shards if local else ():
            file = Path(home) / shard.file
            if missing and not file.exists():
                continue
            if not file.is_file():
                away = manifest.arguments.get("upload")
                hint = (
                    f"upload= moved it to {away}: give that address" if away else "copy it here or make the folder anew"
                )
                raise DataError(f"{file}: missing, {path} lists it; {hint}")
            if file.stat().st_size != shard.bytes:
                sizes = f"is {file.stat().st_size} bytes, {path} says {shard.bytes}"
                log.warning("%s: %s; samples that are not whole are going to be skipped", file, sizes)
        return manifest

    @classmethod
    def _parse(cls, raw: Any, home: str, path: str) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != "latent-shards":
            raise DataError(f'{path}: not a manifest of shards, expected "format": "latent-shards"')
        version = raw.get("version")
        if version not in (VERSION, MAPPED_VERSION):
            raise DataError(
                f"{path}: version is {version!r}, this code reads {VERSION} and {MAPPED_VERSION}; make the folder anew"
            )
        mapped = EntryMap(field_of(raw, "map", dict, path)) if version == MAPPED_VERSION else None
        listed = enumerate(field_of(raw, "shards", list, path))
        shards = [ShardInfo.parse(shard, path, f"shards[{i}].") for i, shard in listed]
        if any((sample.parts is None) != (mapped is None) for shard in shards for sample in shard.samples):
            raise DataError(f"{path}: samples have parts exactly where the manifest has a map; make it anew")
        keys = [sample.key for shard in shards for sample in shard.samples]
        if len(set(keys)) != len(keys):
            (twice, _), *_ = Counter(keys).most_common(1)
            raise DataError(f"{path}: key {twice} is listed twice, expected unique keys; make the folder anew")
        if raw.get("samples", len(keys)) != len(keys):
            raise DataError(f"{path}: samples is {raw['samples']!r}, but {len(keys)} are listed; make the folder anew")
        fps = field_of(raw, "fps", (int, float), path)
        try:
            check_fps(fps)
        except DataError as error:
            raise DataError(f"{path}: {error}; make the folder anew") from error
        counts = {name: field_of(raw, name, int, path) if name in raw else None for name in ("videos", "rejected")}
        return cls(
            shards=tuple(shards),
            fps=float(fps),
            encoder=field_of(raw, "encoder", str, path),
            latent=field_of(raw, "latent", str, path),
            text=field_of(raw, "text", str, path),
            arguments=field_of(raw, "arguments", dict, path),
            videos=counts["videos"],
            rejected=counts["rejected"],
            map=mapped,
            home=home,
            urls=tuple(locate(home, shard.file) for shard in shards),
            maps=(mapped,) * len(shards),
        )


def check_fps(fps: float) -> None:
    """Raise a DataError unless it is a pace, in frames a second."""
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"fps is {fps}, expected frames a second, above 0")


def locate(home: str, file: str) -> str:
    """Where a file of a folder lies, `home` being the folder's path, URL or `pipe:` command with {}."""
    return home.replace("{}", file) if scheme_of(home) == "pipe" else f"{home.rstrip('/')}/{file}"
