"""What a folder of shards says about itself: `manifest.json`, with `empty_prompt.safetensors` beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import braceexpand
import safetensors.torch
from safetensors import SafetensorError

from data.errors import DataError
from data.files import write_bytes
from data.sample import Prompt

FILE = "manifest.json"
EMPTY_PROMPT = "empty_prompt.safetensors"
VERSION = 2
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class SampleInfo:
    """A sample's key, its latent's shape (C, F, H, W), and the bytes of its entries in the tar, headers included."""

    key: str
    shape: Shape
    offset: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """The sample as it stands in a manifest."""
        return {"key": self.key, "shape": list(self.shape), "offset": self.offset, "bytes": self.bytes}


@dataclass(frozen=True)
class ShardInfo:
    """A shard: file name inside the folder, its samples in the order of the tar, its size in bytes, its SHA-256."""

    file: str
    samples: tuple[SampleInfo, ...]
    bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """The shard as it stands in a manifest."""
        samples = [sample.to_json() for sample in self.samples]
        return {"file": self.file, "bytes": self.bytes, "sha256": self.sha256, "samples": samples}

    @classmethod
    def parse(cls, raw: Any, path: Path, where: str) -> ShardInfo:
        """The inverse of `to_json`.

        Raises:
            DataError: naming the file `path` and the field, which starts with `where`.
        """
        samples = []
        for j, sample in enumerate(_get(raw, "samples", list, path, where)):
            inner = f"{where}samples[{j}]."
            key, shape = _get(sample, "key", str, path, inner), _get(sample, "shape", list, path, inner)
            if len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
                raise DataError(f"{path}: {inner}shape is {shape}, expected [C, F, H, W]; make the folder anew")
            offset, size = (_get(sample, name, int, path, inner) for name in ("offset", "bytes"))
            samples.append(SampleInfo(key, (shape[0], shape[1], shape[2], shape[3]), offset, size))
        name = _get(raw, "file", str, path, where)
        size, digest = _get(raw, "bytes", int, path, where), _get(raw, "sha256", str, path, where)
        return cls(name, tuple(samples), size, digest)


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
        folder: where it was loaded from; not part of the file.
        urls: where each shard is read from, anything that webdataset opens; not part of the file.
    """

    shards: tuple[ShardInfo, ...]
    fps: float
    encoder: str
    latent: str
    text: str
    arguments: dict[str, Any]
    folder: Path = field(default=Path(), compare=False)
    urls: tuple[str, ...] = field(default=(), compare=False)

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
        path = self.folder / EMPTY_PROMPT
        try:
            tensors = safetensors.torch.load_file(path)
        except FileNotFoundError as error:
            raise DataError(f"{path}: missing, it holds the empty prompt's embedding; make the folder anew") from error
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read ({error}); make the folder anew") from error
        return Prompt.from_tensors(tensors, str(path))

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`, atomically, one line a shard."""
        head = {
            "format": "latent-shards",
            "version": VERSION,
            "fps": self.fps,
            "encoder": self.encoder,
            "latent": self.latent,
            "text": self.text,
            "arguments": self.arguments,
        }
        lines = ",\n  ".join(json.dumps(shard.to_json()) for shard in self.shards)
        text = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'
        write_bytes(folder / FILE, text.encode())

    @classmethod
    def load(cls, source: str | Path, urls: str | Sequence[str] | None = None) -> Manifest:
        """Read a manifest, and check that its shards are there in the sizes it says.

        Args:
            source: the folder, or the JSON file itself.
            urls: where the shards are read from when they are not beside the manifest: one URL a shard in the
                manifest's order, or one brace pattern such as `pipe:aws s3 cp s3://b/shard-{00000..00009}.tar -`.
                Remote shards are not checked here.

        Raises:
            DataError: no manifest, not a manifest, wrong version, a bad field, a shard missing or of another size,
                or a number of URLs that is not the number of shards.
        """
        path = Path(source)
        path = path if path.suffix == ".json" else path / FILE
        try:
            raw = json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            hint = "the folder is unfinished or not one of shards; make it first, or correct the path"
            raise DataError(f"{path}: no manifest; {hint}") from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as JSON ({error}); make the folder anew") from error
        manifest = cls._parse(raw, path)
        if urls is not None:
            listed = list(braceexpand.braceexpand(urls)) if isinstance(urls, str) else list(urls)
            if len(listed) != len(manifest.shards):
                raise DataError(f"{path}: lists {len(manifest.shards)} shards, but {len(listed)} URLs were given")
            return cls(**{**manifest.__dict__, "urls": tuple(listed)})
        for shard in manifest.shards:
            local = path.parent / shard.file
            if not local.is_file():
                raise DataError(f"{local}: missing, {path} lists it; copy it here or make the folder anew")
            if local.stat().st_size != shard.bytes:
                sizes = f"is {local.stat().st_size} bytes, {path} says {shard.bytes}"
                raise DataError(f"{local}: {sizes}; copy it again or make the folder anew")
        return manifest

    @classmethod
    def _parse(cls, raw: Any, path: Path) -> Manifest:
        if not isinstance(raw, dict) or raw.get("format") != "latent-shards":
            raise DataError(f'{path}: not a manifest of shards, expected "format": "latent-shards"')
        if raw.get("version") != VERSION:
            found = raw.get("version")
            raise DataError(f"{path}: version is {found!r}, this code reads {VERSION}; make the folder anew")
        listed = enumerate(_get(raw, "shards", list, path))
        shards = [ShardInfo.parse(shard, path, f"shards[{i}].") for i, shard in listed]
        keys = [sample.key for shard in shards for sample in shard.samples]
        if len(set(keys)) != len(keys):
            (twice, _), *_ = Counter(keys).most_common(1)
            raise DataError(f"{path}: key {twice} is listed twice, expected unique keys; make the folder anew")
        return cls(
            shards=tuple(shards),
            fps=float(_get(raw, "fps", (int, float), path)),
            encoder=_get(raw, "encoder", str, path),
            latent=_get(raw, "latent", str, path),
            text=_get(raw, "text", str, path),
            arguments=_get(raw, "arguments", dict, path),
            folder=path.parent,
            # Absolute, since a run may change its working directory, and since no URL scheme starts with a slash.
            urls=tuple(str(path.parent.absolute() / shard.file) for shard in shards),
        )


def _get(raw: Any, name: str, kind: type | tuple[type, ...], path: Path, where: str = "") -> Any:
    """`raw[name]`, or a DataError that names the field when it is missing or of another kind."""
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{path}: {where}{name} is {value!r}, expected {kinds}; make the folder anew")
    return value
