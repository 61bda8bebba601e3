"""The videos that a folder of shards is made of: chosen once, before any clip, for all ranks and restarts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.io.files import beside
from data.prepare.rows import Rows

FILE = "plan.json"
"""Where the chosen videos stand while a folder is made: folders that were begun have them under this name."""
_HEAD = 1 << 20  # characters of it, among which the rows begin


@dataclass(frozen=True)
class Rejected:
    """A bad file: the path as listed, why, and how many of its clips were kept."""

    path: str
    reason: str
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" if self.path else self.reason  # which names the line without a path


@dataclass(frozen=True)
class ChosenVideos:
    """The chosen videos, numbered by their place, and what was met while choosing.

    Attributes:
        arguments: what decides the contents of the folder; a folder is only continued with the same.
        root: the folder that the listed paths are relative to.
        rows: the chosen videos.
        rejected: bad files.
        passed: how many videos do not meet the conditions or are too short.
        missing: how many are not on disk.
        unfit: those of `passed` whose headers were read: they are not read again when the list is compared.
        told: what is to be said of the choice, in lines.
    """

    arguments: dict[str, Any]
    root: str
    rows: Rows
    rejected: list[Rejected]
    passed: int
    missing: int = 0
    unfit: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def path(self, row: int) -> Path:
        """Where a chosen video lies."""
        return Path(self.root) / self.rows[row].path

    def save(self, folder: Path, name: str = FILE) -> None:
        """Write `name` into `folder`, atomically."""
        with beside(folder / name) as fresh, fresh.open("w", encoding="utf-8") as file:
            about = {**vars(self), "rejected": [asdict(entry) for entry in self.rejected]}
            for number, (key, value) in enumerate(about.items()):
                file.write(f"{', ' if number else '{'}{json.dumps(key)}: ")
                file.writelines(self.rows.to_json() if key == "rows" else [json.dumps(value)])
            file.write("}")

    @classmethod
    def load(cls, folder: Path, name: str = FILE) -> ChosenVideos | None:
        """What `save` wrote into `folder`, or None where there is nothing yet."""
        try:
            with (folder / name).open(encoding="utf-8") as file:
                # within a text its quotes would have backslashes before them
                before, _, after = file.read(_HEAD).partition(', "rows": [')
                rows, behind = Rows.read(after, file)
        except FileNotFoundError:
            return None
        raw = json.loads(before + behind)
        rejected = [Rejected(**entry) for entry in raw["rejected"]]
        return cls(**{**raw, "rows": rows, "rejected": rejected})
