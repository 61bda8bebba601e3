"""The records of what is on disk: a file for each finished shard, with what was done since the one before."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError, naming
from data.io.files import write_bytes
from data.prepare.chosen import Rejected
from data.shards.shard_info import ShardInfo

FOLDER = ".prepare"
"""Of the journal, in the folder of shards."""
RECORD = re.compile(r"record-(\d{3,})-(\d{5})\.json")


@dataclass(frozen=True)
class Cut:
    """A caption that is longer than a text encoder takes: its video, the encoder, its tokens, those that are used."""

    path: str
    encoder: str
    tokens: int
    used: int


@dataclass
class Records:
    """What all ranks have done so far: shards in the order of their names, done videos, bad files, cut captions, and
    how much of the videos is left out and why, by the keys of `data.prepare.clip_rules.REASONS`."""

    shards: list[ShardInfo] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    rejected: list[Rejected] = field(default_factory=list)
    cut: list[Cut] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)


def write_record(
    home: Path,
    rank: int,
    number: int,
    shard: ShardInfo | None,
    rows: Sequence[int],
    rejected: Sequence[Rejected],
    cut: Sequence[Cut],
    left: Mapping[str, int],
) -> None:
    """Write record `number` of a rank into the journal's folder `home`, atomically."""
    content = {
        "shard": shard.to_json() if shard else None,
        "rows": list(rows),
        "rejected": [asdict(entry) for entry in rejected],
        "cut": [asdict(entry) for entry in cut],
        "left": dict(left),
    }
    path = home / f"record-{rank:03d}-{number:05d}.json"
    with naming(path):
        write_bytes(path, json.dumps(content).encode())


def read_records(folder: Path) -> Records:
    """The records of all ranks so far; what several list counts once, as after `underway.reopen`."""
    home, records = folder / FOLDER, Records()
    shards: dict[str, ShardInfo] = {}
    rejected: dict[Rejected, None] = {}
    for name in sorted(names_in(home)):
        if RECORD.fullmatch(name):
            raw: dict[str, Any] = json.loads((home / name).read_text(encoding="utf-8"))
            if raw["shard"] is not None:
                shard = ShardInfo.parse(raw["shard"], home / name, "shard.")
                shards[shard.file] = shard
            records.done.update(raw["rows"])
            rejected.update((Rejected(**entry), None) for entry in raw["rejected"])
            records.cut += [Cut(**entry) for entry in raw.get("cut", [])]
            records.left.update(raw.get("left", {}))
    records.shards = [shards[file] for file in sorted(shards)]
    records.rejected = list(rejected)
    return records


def check_unique(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Raise a DataError where two samples have one key: two processes wrote it, where no file can be locked."""
    home: dict[str, str] = {}
    for shard in shards:
        for sample in shard.samples:
            if sample.key in home:
                raise DataError(
                    f"{folder}: sample {sample.key} is in {home[sample.key]} and in {shard.file}; were two runs at it "
                    "that do not see each other's locks? Delete the folder and make it anew"
                )
            home[sample.key] = shard.file


def names_in(folder: Path) -> Collection[str]:
    """The names of what lies in a folder; none where there is no folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
