"""Damage to a folder of shards, in each of its kinds, and which samples the log names."""

from __future__ import annotations

import json
import re
import tarfile
from typing import Any

import pytest

from data.shards.manifest import Manifest


def damage(manifest: Manifest, shard: int, start: int, content: bytes | None) -> None:
    """Overwrite a shard from byte `start` on, or cut it off there."""
    path = manifest.folder / manifest.shards[shard].file
    whole = path.read_bytes()
    path.write_bytes(whole[:start] if content is None else whole[:start] + content + whole[start + len(content) :])


def offset_of(manifest: Manifest, shard: int, name: str) -> int:
    with tarfile.open(manifest.folder / manifest.shards[shard].file) as tar:
        return tar.getmember(name).offset_data


def with_nan(manifest: Manifest) -> None:
    """The latent of s007 holds a NaN, in a shard that is whole."""
    start = offset_of(manifest, 1, "s007.safetensors")
    path = manifest.folder / manifest.shards[1].file
    header = int.from_bytes(path.read_bytes()[start : start + 8], "little")
    names = json.loads(path.read_bytes()[start + 8 : start + 8 + header])
    damage(manifest, 1, start + 8 + header + names["latent"]["data_offsets"][0], b"\xff\x7f")


DAMAGE: dict[str, tuple[Any, list[str]]] = {
    "cut": (lambda m: damage(m, 1, offset_of(m, 1, "s007.safetensors") + 10, None), ["s007", "s008", "s009"]),
    "header": (lambda m: damage(m, 1, offset_of(m, 1, "s007.json") - 512, b"\xff" * 512), ["s007"]),
    "tensors": (lambda m: damage(m, 1, offset_of(m, 1, "s007.safetensors"), b"\xff" * 8), ["s007"]),
    "json": (lambda m: damage(m, 1, offset_of(m, 1, "s007.json"), b"]"), ["s007"]),
    "nan": (with_nan, ["s007"]),
    "whole": (lambda m: damage(m, 1, 0, b"\0" * m.shards[1].bytes), ["s005", "s006", "s007", "s008", "s009"]),
}


def skipped(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The keys of the samples that the log names, all of the second shard."""
    found = [re.search(r"shard-00001.tar: sample (s\d+): .*; skipped$", message) for message in caplog.messages]
    return [match[1] for match in found if match]
