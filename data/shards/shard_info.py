"""What a manifest lists: the shards of a folder, and where each sample lies in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class SampleInfo:
    """A sample's key, its latent's shape (C, F, H, W), and the bytes of its entries in the tar, headers included.

    `crc32` is the CRC-32 of those bytes; None in manifests of earlier versions. `parts` are the places of the entries
    in those bytes, name, first byte and size, in tars that somebody else wrote (`Manifest.map`); None in ours. `stored`
    are the latent frames on disk where only the first F of them are wanted (`data.shards.views.cut`); not in the file.
    """

    key: str
    shape: Shape
    offset: int
    bytes: int
    crc32: int | None = None
    parts: tuple[tuple[str, int, int], ...] | None = None
    stored: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The sample as it stands in a manifest."""
        raw = {"key": self.key, "shape": list(self.shape), "offset": self.offset, "bytes": self.bytes}
        if self.crc32 is not None:
            raw["crc32"] = self.crc32
        if self.parts is not None:
            raw["parts"] = [list(part) for part in self.parts]
        return raw


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
    def parse(cls, raw: Any, path: str | Path, where: str) -> ShardInfo:
        """The inverse of `to_json`.

        Raises:
            DataError: naming the file `path` and the field, which starts with `where`.
        """
        samples = []
        for j, sample in enumerate(field_of(raw, "samples", list, path, where)):
            inner = f"{where}samples[{j}]."
            key, shape = field_of(sample, "key", str, path, inner), field_of(sample, "shape", list, path, inner)
            if len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
                raise DataError(f"{path}: {inner}shape is {shape}, expected [C, F, H, W]; make the folder anew")
            offset, size = (field_of(sample, name, int, path, inner) for name in ("offset", "bytes"))
            if offset < 0 or size < 1:
                raise DataError(f"{path}: {inner}offset is {offset} and bytes {size}, expected a place in the shard")
            crc32 = field_of(sample, "crc32", int, path, inner) if "crc32" in sample else None
            parts = None
            if "parts" in sample:
                parts = tuple(_part(part, size, path, inner) for part in field_of(sample, "parts", list, path, inner))
            samples.append(SampleInfo(key, (shape[0], shape[1], shape[2], shape[3]), offset, size, crc32, parts))
        name = field_of(raw, "file", str, path, where)
        size, digest = field_of(raw, "bytes", int, path, where), field_of(raw, "sha256", str, path, where)
        # Both become parts of paths and of `pipe:` commands.
        if not _NAME.fullmatch(name):
            raise DataError(f"{path}: {where}file is {name!r}, expected a file name of letters, digits, _, - and .")
        if not _SHA256.fullmatch(digest):
            raise DataError(f"{path}: {where}sha256 is {digest!r}, expected 64 hexadecimal digits")
        return cls(name, tuple(samples), size, digest)


def _part(raw: Any, size: int, path: str | Path, where: str) -> tuple[str, int, int]:
    """The place of an entry within the bytes of its sample."""
    if not (isinstance(raw, list) and len(raw) == 3 and [type(value) for value in raw] == [str, int, int]):
        raise DataError(f"{path}: {where}parts has {raw!r}, expected [name, first byte, bytes]; make the folder anew")
    name, first, count = raw
    if not (0 <= first <= first + count <= size and count >= 0):
        raise DataError(f"{path}: {where}parts: {name} is no place within the sample; make the folder anew")
    return name, first, count


def field_of(raw: Any, name: str, kind: type | tuple[type, ...], path: str | Path, where: str = "") -> Any:
    """The field `raw[name]` of a manifest.

    Args:
        path: the manifest's file.
        where: what its name starts with in messages.

    Raises:
        DataError: it is missing or of another kind, naming it.
    """
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise DataError(f"{path}: {where}{name} is {value!r}, expected {kinds}; make the folder anew")
    return value
