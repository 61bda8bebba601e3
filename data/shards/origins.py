"""Which video each sample of a folder was cut from, and the split of several folders by video."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.remote import read_all, scheme_of
from data.shards.manifest import Manifest, locate

LIST = "videos.json"
"""The videos of a finished folder of `data.prepare`, beside the manifest: its rows, by their numbers."""
MADE_BY = "data.prepare"
AT_MOST = 0.25
"""The share of a folder that may be held out where a number of samples is asked for."""
_KEY = re.compile(r"v(\d{7,})-(\d{4,})")


def key_of(row: int, clip: int) -> str:
    """The key of a clip of a row of `LIST`: the same in every run over the same videos."""
    return f"v{row:07d}-{clip:04d}"


def numbers_of(key: str) -> tuple[int, int] | None:
    """The inverse of `key_of`; None of another key."""
    match = _KEY.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def sources_of(manifest: Manifest) -> list[str]:
    """The path of each sample's video, as it was listed for `data.prepare`.

    Args:
        manifest: of one folder.

    Raises:
        DataError: neither the folder's list of videos nor its samples name them, or a file cannot be read.
    """
    local = scheme_of(manifest.home) == "file"
    if manifest.map is None and (manifest.folder / LIST).is_file() if local else _is_prepared(manifest):
        path = locate(manifest.home, LIST)
        try:
            rows = [row["path"] for row in json.loads(read_all(path))["rows"]]
            return [rows[_row(sample.key)] for sample in manifest.samples]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: does not list the videos of the samples ({error!r}); copy it again") from error
    found = [meta.get("source") for meta in metas_of(manifest)] if local and manifest.map is None else [None]
    if not all(isinstance(source, str) for source in found):
        raise DataError(f"{manifest.home}: nothing tells which video each sample is from, expected {LIST} beside it")
    return [str(source) for source in found]


def _is_prepared(manifest: Manifest) -> bool:
    return manifest.arguments.get("made_by") == MADE_BY


def _row(key: str) -> int:
    numbers = numbers_of(key)
    if numbers is None:
        raise KeyError(key)
    return numbers[0]


def metas_of(manifest: Manifest) -> list[dict[str, Any]]:
    """The JSON of each sample of a folder of this machine, whose tars are ours; nothing else of them is read.

    Raises:
        DataError: a shard is not what the manifest lists.
    """
    metas = []
    for url, shard in zip(manifest.urls, manifest.shards, strict=True):
        with Path(url.removeprefix("file://")).open("rb") as file:
            for sample in shard.samples:
                file.seek(sample.offset)
                try:
                    member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
                    if member.name != f"{sample.key}.json":
                        raise ValueError(f"found {member.name}")
                    metas.append(json.loads(file.read(member.size)))
                except (tarfile.HeaderError, ValueError) as error:
                    raise DataError(f"{url}: sample {sample.key} is not where its manifest says ({error})") from error
    return metas


def held_out(manifests: Sequence[Manifest], amount: float) -> list[set[int]]:
    """For each folder the numbers of the samples that are held out: all clips of a video, in all folders, or none.

    A video is chosen by its path alone, and for a number of samples by those listed before it in its folder, so that
    what is appended to a folder changes nothing for what was there.

    Args:
        manifests: of the folders.
        amount: below 1 about this share of the videos; else at least so many samples, the same number of each folder,
            about every fourth video until there are enough.

    Raises:
        DataError: as `sources_of`, or a folder has too few videos.
    """
    sources = [sources_of(manifest) for manifest in manifests]
    if amount < 1:
        chosen = {source for its in sources for source in its if _draw(source) < amount}
    else:
        chosen = set()
        for number, (manifest, its) in enumerate(zip(manifests, sources, strict=True)):
            wanted = int(amount) // len(manifests) + (number < int(amount) % len(manifests))
            chosen |= _first(manifest, its, wanted)
    return [{number for number, source in enumerate(its) if source in chosen} for its in sources]


def _first(manifest: Manifest, sources: Sequence[str], wanted: int) -> set[str]:
    """The first videos of a folder, of those that may be drawn, which have so many samples."""
    counts, chosen, found = Counter(sources), set[str](), 0
    for _, source in sorted(zip((sample.key for sample in manifest.samples), sources, strict=True)):
        if found >= wanted:
            break
        if source not in chosen and _draw(source) < AT_MOST:
            chosen.add(source)
            found += counts[source]
    if found < wanted:
        raise DataError(
            f"{manifest.home}: {wanted} samples cannot be held out of its {len(sources)} of {len(counts)} videos, of "
            f"which every fourth may be: {found}; hold out fewer, or a share such as 0.05"
        )
    return chosen


def _draw(source: str) -> float:
    """A number in [0, 1) that belongs to a path."""
    digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
