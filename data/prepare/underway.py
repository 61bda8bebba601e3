"""How a folder of shards stands: begun, under way on some ranks, finished, or under way again with more videos.

While it is under way it holds a folder `.prepare` (`data.prepare.journal`). When all chosen videos are done, the rank
that sees it first writes the manifest and removes `.prepare`; the list of videos stays beside it as `videos.json`, so
that the next run can see what was added, and append it (`reopen`).

Ranks choose, begin and merge one after the other (`exclusively`). Where the file system has no locks, ranks may do the
same at the same time: the same videos and the same manifest come of it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from data.errors import DataError
from data.io.locks import Lock, take
from data.prepare.chosen import FILE as CHOSEN
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.records import FOLDER, names_in, write_record
from data.shards.manifest import FILE, Manifest

_LOCK = "plan.lock"
WORLD = "world"
"""The file in the journal that holds the number of ranks."""


class FinishedError(Exception):
    """Another rank has ended the run."""


class NoClipsError(FinishedError):
    """Another rank has ended the run without a manifest, as no clip came out."""


@contextlib.contextmanager
def exclusively(folder: Path) -> Iterator[Path]:
    """The journal's folder, for one process after the other; it is removed again when nothing is left in it."""
    home = folder / FOLDER
    made = not folder.exists()
    file = locked(home / _LOCK, wait=True)
    assert file is not None
    try:
        yield home
    except BaseException:
        # Nothing was begun: leave no trace.
        with contextlib.suppress(OSError):
            if names_in(home) == [_LOCK]:
                (home / _LOCK).unlink()
                home.rmdir()
            if made:
                folder.rmdir()
        raise
    finally:
        file.close()


def is_claimed(folder: Path) -> bool:
    """Whether a rank has ever begun to write; before that, other videos may be chosen."""
    return (folder / FOLDER / WORLD).exists()


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a finished folder, None where there is none."""
    try:
        if not (folder / FILE).exists():
            return None
        found = Manifest.load(folder, missing=True)
        return found if found.arguments.get("upload") else Manifest.load(folder)  # which misses shards that have to be
    except DataError:
        if (folder / FILE).exists():
            raise
        return None  # another rank has reopened it in between


def check_open(folder: Path) -> None:
    """Raise a FinishedError where the folder's manifest is there."""
    if (folder / FILE).exists():
        raise FinishedError(folder)


def check_begun(folder: Path) -> None:
    """Raise a FinishedError where the folder's manifest is there, a NoClipsError where its journal went without one."""
    check_open(folder)
    if not (folder / FOLDER / CHOSEN).exists():
        check_open(folder)  # where there are no locks, another rank may have merged since
        raise NoClipsError(folder)


def locked(path: Path, wait: bool) -> TextIO | None:
    """The file, made where it is missing and locked; None where another process has it and `wait` is false.

    Where the file system has no locks it is only made.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue  # the folder went in between
        if take(file, wait=wait) is Lock.HELD:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            # Who had it before may have removed it, and others lock the next file of this name.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def reopen(folder: Path, chosen: ChosenVideos, manifest: Manifest, done: int, rejected: Sequence[Rejected]) -> None:
    """Make a finished folder one that is under way again, inside `exclusively`: all of it is recorded, nothing moved.

    The manifest goes last and stays in the journal: a kill before that leaves a finished folder. What a kill left in
    the journal after the folder was finished stays, as it lists nothing that the manifest does not. Where the file
    system has no locks, several ranks may do this at once, and one late while others write already: nothing is removed,
    all write the same, and the manifest goes once.

    Args:
        folder: of the shards.
        chosen: the videos that it is going to be made of, more than there were.
        manifest: of what it holds.
        done: how many of their rows are done.
        rejected: the bad files among them.
    """
    home = folder / FOLDER
    if manifest_of(folder) != manifest:
        return  # another rank has reopened it since
    for number, shard in enumerate(manifest.shards):
        write_record(home, 0, number, shard, [], [], [], {})
    write_record(home, 0, len(manifest.shards), None, range(done), rejected, [], {})
    chosen.save(home)
    with contextlib.suppress(FileNotFoundError):
        (folder / FILE).rename(home / FILE)


def remove(folder: Path) -> None:
    """Remove the journal of a folder that is finished."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
