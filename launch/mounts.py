"""What a run reads and writes outside of the folder that it is started in: a container sees none of it by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from train.config.keys import value_of
from train.config.schema import KEYS, RunConfig


def folders_of(config: RunConfig) -> tuple[list[Path], dict[str, str]]:
    """The places that a run's path keys lead to and that lie outside of the current folder, links in them followed.

    Returns:
        Those that are on this machine, none within another; and by key those that are not, which may be on the nodes.
    """
    here = Path.cwd().resolve()
    found: set[Path] = set()
    absent: dict[str, str] = {}
    for key in sorted(name for name, key in KEYS.items() if key.is_path):
        value = config.data.places if key == "data.shards" else value_of(config, key)
        for text in value if isinstance(value, list) else [value]:
            if text is None or "://" in text or text.startswith(("pipe:", "hub:")):
                continue
            path = Path(text).expanduser().absolute()
            if path.exists():
                found |= set(_places(path))
            elif not path.is_relative_to(here):
                absent[key] = text
    if (config.model.path or "").startswith("hub:"):
        cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        found |= {cache} if cache.is_dir() else set()
    outside = {path for path in found if not path.is_relative_to(here)}
    return sorted(path for path in outside if not outside & set(path.parents)), absent


def _places(path: Path) -> Iterator[Path]:
    """The path as it is written, what it is a link to, and the folders that links within it lead to."""
    yield path
    yield path.resolve()
    for inner in path.rglob("*") if path.is_dir() else ():
        if inner.is_symlink() and inner.exists():
            yield inner.resolve().parent
