"""What is on disk already: how a run that was killed at any moment goes on without a clip twice or a clip lost.

While a folder is made it holds a folder `.prepare`. Each finished shard gets a record there, which lists its samples,
and the videos that were done and the bad files that were met since the record before. A shard counts from the moment
its record has its name: a tar that was begun and has none is written anew, and a tar that nothing here names is left as
it is. Any number of ranks may continue what any other number began. A rank holds its lock as long as it writes, and the
number of ranks is kept: a run with another number begins only when no rank writes any more.
"""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from data.errors import DataError, naming
from data.io.files import write_bytes
from data.io.locks import Lock, say_no_locks, take
from data.prepare.arguments import check_same
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.records import FOLDER, RECORD, Cut, names_in, read_records, write_record
from data.prepare.underway import WORLD, check_begun, exclusively, locked
from data.prepare.upload import Upload
from data.shards.begun import Begun, shards_in
from data.shards.origins import numbers_of
from data.shards.sample import Sample
from data.shards.shard_info import ShardInfo
from data.shards.writer import TarShards
from radial.cli.ranks import Rank

_BEGUN = re.compile(r"begun-(\d{3,})\.txt")
_SHARD = re.compile(r"shard-(\d{3,})-(\d{5})\.tar")


class Journal:
    """The records of one rank, over those of all.

    Args:
        folder: of the shards.
        chosen: the videos that the folder is made of.
        rank: this process's part of the run.
        max_bytes: of a shard.
        max_seconds: after which a shard is finished: a kill costs no more.
        upload: where finished shards move to; None: they stay.

    Attributes:
        done: the videos that are done, on any rank, when this rank started.
        present: the clips on disk by video, of any rank, when this rank started.
        rejected: how many bad files there were on any rank then, and on this one since.
        strays: tars in the folder that nothing names.

    Raises:
        DataError: another process writes as this rank, or as one of another number of ranks, or has chosen other
            videos since these were read.
        FinishedError: the run has ended.
    """

    def __init__(
        self,
        folder: Path,
        chosen: ChosenVideos,
        rank: Rank,
        max_bytes: int,
        max_seconds: float,
        upload: Upload | None = None,
    ) -> None:
        self._folder, self._home, self._rank, self._upload = folder, folder / FOLDER, rank.index, upload
        with exclusively(folder):
            check_begun(folder)
            there = ChosenVideos.load(self._home)
            if there is not None and there != chosen:
                check_same(folder, there.arguments, chosen.arguments)
                raise DataError(
                    f"{folder}: another data.prepare has chosen other videos for it since this one began, as the list "
                    "has changed; start this one again"
                )
            self._lock = self._claimed(rank.world)
            try:
                self._begin(rank.world, max_bytes, max_seconds)
            except BaseException:
                self._lock.close()
                raise

    def _begin(self, world: int, max_bytes: int, max_seconds: float) -> None:
        """Read the records, and clear what was begun and has none."""
        folder, rank = self._folder, self._rank
        records = read_records(folder)
        self.done = records.done
        self.present: dict[int, set[int]] = {}
        for shard in records.shards:
            for sample in shard.samples:
                clip = numbers_of(sample.key)
                assert clip is not None
                self.present.setdefault(clip[0], set()).add(clip[1])
        self.rejected = len(records.rejected)
        recorded = {shard.file for shard in records.shards}
        named = set(recorded)
        for match in filter(None, map(_BEGUN.fullmatch, names_in(self._home))):
            begun = Begun(self._home / match[0])
            # What ranks of an earlier, larger world left is rank 0's to clear.
            if int(match[1]) == rank or (rank == 0 and int(match[1]) >= world):
                begun.clear(folder, recorded)
            named.update(begun.names())
        there = shards_in(folder)
        if self._upload is not None:  # a kill came between a record and this
            for name in recorded.intersection(there):
                (folder / name).unlink(missing_ok=True)
        self.strays = [name for name in there if name not in named]
        shards = [int(m[2]) for m in map(_SHARD.fullmatch, {*there, *recorded}) if m and int(m[1]) == rank]
        numbers = [int(m[2]) for m in map(RECORD.fullmatch, names_in(self._home)) if m and int(m[1]) == rank]
        self._next = max(numbers, default=-1) + 1
        first = max([*numbers, *shards], default=-1) + 1
        self._rows: list[int] = []
        self._bad: list[Rejected] = []
        self._cut: list[Cut] = []
        self._left: Counter[str] = Counter()
        self._torn = False
        self._begun = Begun(self._home / f"begun-{rank:03d}.txt")
        self._shards = TarShards(
            folder,
            lambda n: self._named(f"shard-{rank:03d}-{first + n:05d}.tar"),
            self.record,
            max_samples=1 << 20,
            max_bytes=max_bytes,
            max_seconds=max_seconds,
        )

    def _named(self, name: str) -> str:
        """The name of a shard that is about to be made."""
        with naming(self._home):
            self._begun.add(name)
        return name

    def write(self, sample: Sample) -> None:
        """Add a sample, see `TarShards.write`; whenever this finishes a shard, it is recorded."""
        try:
            self._shards.write(sample)
        except DataError:
            raise  # nothing of it was written
        except BaseException:
            self._torn = True
            raise

    def finish_row(self, row: int, rejected: Rejected | None, left: Mapping[str, int]) -> None:
        """The video's last sample is written; `rejected` when the file is bad; `left`: what is not taken of it."""
        self._rows.append(row)
        self._left.update(left)
        if rejected is not None:
            self._bad.append(rejected)
            self.rejected += 1

    def cut(self, path: str, lengths: Mapping[str, tuple[int, int]]) -> None:
        """A caption has so many tokens for each text encoder, of so many that are used; those that are longer count."""
        self._cut += [Cut(path, name, tokens, used) for name, (tokens, used) in lengths.items() if tokens > used]

    def flush(self) -> None:
        """Finish and record the shard in work, and the videos since then; not after a write that failed half way."""
        if self._torn:
            return
        self._shards.flush()
        if self._rows:
            self.record(None)

    def close(self) -> None:
        """Drop the shard in work unless it was flushed, and let other processes write."""
        self._shards.abort()
        self._lock.close()

    def record(self, shard: ShardInfo | None) -> None:
        """Write what has come since the record before: a finished shard, if any, and the videos that were done."""
        file = None if shard is None or self._upload is None else self._folder / shard.file
        if file is not None and self._upload is not None:
            self._upload.send(file)
        write_record(self._home, self._rank, self._next, shard, self._rows, self._bad, self._cut, self._left)
        if file is not None:
            file.unlink(missing_ok=True)
        self._next += 1
        self._rows, self._bad, self._cut, self._left = [], [], [], Counter()

    def _claimed(self, world: int) -> TextIO:
        """This rank's lock, of a run with this number of ranks."""
        kept = self._home / WORLD
        before = kept.read_text(encoding="utf-8") if kept.exists() else ""
        if before != str(world):
            for path in sorted(self._home.glob("rank-*.lock")):
                self._lock_of(path, f" of {before}" if before else "", f" with {world} ranks").close()
            write_bytes(kept, str(world).encode())
        file = self._lock_of(self._home / f"rank-{self._rank:03d}.lock", f" of {world}", "")
        if take(file) is Lock.NONE:
            say_no_locks(self._folder, "another data.prepare that writes into it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def _lock_of(self, path: Path, of: str, asked: str) -> TextIO:
        """A rank's lock, or a DataError that names who has it."""
        file = locked(path, wait=False)
        if file is None:
            who = path.read_text(encoding="utf-8").strip()
            raise DataError(
                f"{self._folder}: another data.prepare is writing rank {int(path.stem[5:])}{of} of it "
                f"({who}); wait for it or stop it before you start this one{asked}, "
                "or choose another out="
            )
        return file
