"""Folders of videos: every file in them and in the folders that are linked there, and what is left aside by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv",
    ".ogv", ".3gp", ".m2ts", ".mts", ".mxf",
)  # fmt: skip
"""What a file's name ends in when it is taken as a video."""


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        videos: the videos, in the order of their names.
        aside: what is not used, by kind, with how many there are of it.
        captioned: files that are no videos by their names, with a caption beside them.
    """

    videos: list[Path] = field(default_factory=list)
    aside: Counter[str] = field(default_factory=Counter)
    captioned: list[Path] = field(default_factory=list)

    def told(self, root: Path) -> list[str]:
        """What is not used, in lines; none where all is."""
        lines = []
        if self.aside:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.aside.items()))
            lines.append(f"{root}: not used as videos: {kinds}")
        if self.captioned:
            some = ", ".join(str(path.relative_to(root)) for path in self.captioned[:5])
            more = f" and {len(self.captioned) - 5} more" if len(self.captioned) > 5 else ""
            lines.append(
                f"{root}: {some}{more} have captions beside them, but do not end in {', '.join(SUFFIXES)}; "
                "turn them into .mp4 if they are videos"
            )
        return lines


def search(root: Path) -> Found:
    """All videos in a folder, in its folders and in those that are linked there; hidden ones are left aside.

    A folder that several links lead to is entered once, by its own path where it lies in `root`, so that a ring of
    links ends.
    """
    found = Found()
    paths = list(_files(root, found.aside))
    taken = {path.with_suffix("") for path in paths if path.suffix.lower() in SUFFIXES}
    captions = {path for path in paths if path.suffix == ".txt"}
    for path in paths:
        if path.suffix.lower() in SUFFIXES:
            found.videos.append(path)
        elif path not in captions or path.with_suffix("") not in taken:
            if path not in captions and path.with_suffix(".txt") in captions and path.with_suffix("") not in taken:
                found.captioned.append(path)
            alone = " without a video of its name" if path in captions else ""
            found.aside[f"{path.suffix.lower() or 'without an ending'}{alone}"] += 1
    found.videos.sort()
    found.captioned.sort()
    return found


def _files(root: Path, aside: Counter[str]) -> Iterator[Path]:
    """Every file that is not hidden; folders and links that lead nowhere new are counted in `aside`."""
    linked: list[Path] = []
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting or linked:
        # Own folders first, so that what is reached in two ways has the path without a link.
        folder = waiting.pop() if waiting else linked.pop(0)
        try:
            about = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            aside[f"folders that cannot be read ({error.strerror}: {folder})"] += 1
            continue
        if (about.st_dev, about.st_ino) in entered:
            aside["links to folders that are searched already"] += 1
            continue
        entered.add((about.st_dev, about.st_ino))
        for entry in entries:
            if entry.name.startswith("."):  # macOS puts a ._NAME beside files on disks that are not its own
                aside["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(folder / entry.name)
            elif entry.is_symlink() and entry.is_dir():
                linked.append(folder / entry.name)
            else:
                yield folder / entry.name
