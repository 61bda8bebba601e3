"""What is on disk already: how a run that was killed at any moment goes on without a clip twice or a clip lost.

While a folder is made it holds a folder `.prepare`. Each finished shard gets a record there, which lists its samples,
and the videos that were done and the bad files that were met since the record before. A shard counts from the moment
its record has its name: a tar without one is written anew. Any number of ranks may continue what any other number
began. When all videos of the plan are done, the rank that sees it first writes the manifest and removes `.prepare`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from data.errors import DataError
from data.files import write_bytes
from data.manifest import ShardInfo
from data.prepare.plan import Rejected
from data.sample import Sample
from data.writer import TarShards

FOLDER = ".prepare"
_RECORD = re.compile(r"record-(\d{3,})-(\d{5})\.json")
_SHARD = re.compile(r"\.?(shard-(\d{3,})-\d{5}\.tar)(\.tmp)?")


class Journal:
    """The records of one rank, over those of all.

    Args:
        folder: of the shards.
        rank, world: this process's part of the run.
        max_bytes: of a shard.

    Attributes:
        done: the videos that are done, on any rank, when this rank started.
        present: the clips on disk by video, of any rank, when this rank started.
        rejected: how many bad files there were on any rank then, and on this one since.

    Raises:
        DataError: another process writes as this rank.
    """

    def __init__(self, folder: Path, rank: int, world: int, max_bytes: int) -> None:
        self._folder, self._home, self._rank = folder, folder / FOLDER, rank
        self._home.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        shards, self.done, rejected = read_records(folder)
        self.present: dict[int, set[int]] = {}
        for shard in shards:
            for sample in shard.samples:
                row, clip = _numbers_of(sample.key)
                self.present.setdefault(row, set()).add(clip)
        self.rejected = len(rejected)
        recorded = {shard.file for shard in shards}
        for path in folder.iterdir():
            match = _SHARD.fullmatch(path.name)
            # What ranks of an earlier, larger world left is rank 0's to clear.
            if (
                match
                and path.name not in recorded
                and (int(match[2]) == rank or (rank == 0 and int(match[2]) >= world))
            ):
                path.unlink()
        numbers = [int(m[2]) for m in map(_RECORD.fullmatch, _names(self._home)) if m and int(m[1]) == rank]
        self._next = max(numbers, default=-1) + 1
        self._rows: list[int] = []
        self._bad: list[Rejected] = []
        first = self._next
        self._shards = TarShards(
            folder,
            lambda n: f"shard-{rank:03d}-{first + n:05d}.tar",
            self._record,
            max_samples=1 << 20,
            max_bytes=max_bytes,
        )

    def write(self, sample: Sample) -> None:
        """Add a sample, see `TarShards.write`; whenever this finishes a shard, it is recorded."""
        self._shards.write(sample)

    def finish_row(self, row: int, rejected: Rejected | None) -> None:
        """The video's last sample is written; `rejected` when the file is bad."""
        self._rows.append(row)
        if rejected is not None:
            self._bad.append(rejected)
            self.rejected += 1

    def flush(self) -> None:
        """Finish and record the shard in work, and the videos since then."""
        self._shards.flush()
        if self._rows:
            self._record(None)

    def close(self) -> None:
        """Drop the shard in work, whose videos are not done, and let other processes write."""
        self._shards.abort()
        self._lock.close()

    def _record(self, shard: ShardInfo | None) -> None:
        content = {
            "shard": shard.to_json() if shard else None,
            "rows": self._rows,
            "rejected": [asdict(entry) for entry in self._bad],
        }
        path = self._home / f"record-{self._rank:03d}-{self._next:05d}.json"
        write_bytes(path, json.dumps(content).encode())
        self._next += 1
        self._rows, self._bad = [], []

    def _locked(self) -> TextIO:
        file = (self._home / f"rank-{self._rank:03d}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            hint = "wait for it, stop it, or choose another out="
            raise DataError(
                f"{self._folder}: another data.prepare is writing rank {self._rank} of it; {hint}"
            ) from error
        return file


def key_of(row: int, clip: int) -> str:
    """The key of a video's clip: the same in every run of a plan."""
    return f"v{row:07d}-{clip:04d}"


def _numbers_of(key: str) -> tuple[int, int]:
    """The inverse of `key_of`."""
    row, _, clip = key.removeprefix("v").partition("-")
    return int(row), int(clip)


@contextlib.contextmanager
def planning(folder: Path) -> Iterator[Path]:
    """The journal's folder, for one process after the other; it is removed again when nothing is left in it."""
    home = folder / FOLDER
    made = [path for path in (folder, home) if not path.exists()]
    home.mkdir(parents=True, exist_ok=True)
    lock = home / "plan.lock"
    try:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield home
    except BaseException:
        # Nothing was begun: leave no trace.
        with contextlib.suppress(OSError):
            lock.unlink(missing_ok=True)
            for path in reversed(made):
                path.rmdir()
        raise


def read_records(folder: Path) -> tuple[list[ShardInfo], set[int], list[Rejected]]:
    """The shards, done videos and bad files of all ranks so far, shards in the order of their names."""
    home = folder / FOLDER
    shards: list[ShardInfo] = []
    done: set[int] = set()
    rejected: list[Rejected] = []
    for name in sorted(_names(home)):
        if _RECORD.fullmatch(name):
            raw: dict[str, Any] = json.loads((home / name).read_text())
            if raw["shard"] is not None:
                shards.append(ShardInfo.parse(raw["shard"], home / name, "shard."))
            done.update(raw["rows"])
            rejected += [Rejected(**entry) for entry in raw["rejected"]]
    return shards, done, rejected


def remove(folder: Path) -> None:
    """Remove the journal of a folder that is finished."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _names(folder: Path) -> Collection[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
