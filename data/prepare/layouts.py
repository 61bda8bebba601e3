"""How common collections of videos are laid out: names of columns, lists inside folders, files beside the videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import lines_of, read_utf8

PATHS = ("path", "video", "video_path", "file", "file_name", "filename", "file_path", "media_path", "videos")
CAPTIONS = ("caption", "text", "prompt")
"""The usual names of the columns of paths and captions; the first that is there is taken."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
VIDEOS, PROMPTS = "videos.txt", ("prompts.txt", "prompt.txt", "captions.txt")


def table_in(folder: Path) -> Path | None:
    """The table that a folder carries as Hugging Face's video folders do, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def parquets_in(folder: Path) -> list[Path]:
    """The Parquet files of a data set of Hugging Face, in the order of their names: in the folder, or in its `data`."""
    return sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))


def lists_in(folder: Path) -> list[dict[str, Any]] | None:
    """The rows of a folder with a path in each line of videos.txt and its caption in that of prompts.txt, or None.

    Raises:
        DataError: one of the two has more lines.
    """
    prompts = next((folder / name for name in PROMPTS if (folder / name).is_file()), None)
    if prompts is None or not (folder / VIDEOS).is_file():
        return None
    paths, captions = lines_of(read_utf8(folder / VIDEOS)), lines_of(read_utf8(prompts))
    if len(paths) != len(captions):
        raise DataError(
            f"{folder}: {VIDEOS} has {len(paths)} lines and {prompts.name} {len(captions)}, expected a caption for "
            "each video"
        )
    return [{"path": path.strip(), "caption": text} for path, text in zip(paths, captions, strict=True)]


@dataclass(frozen=True)
class Collection:
    """How the tables of a public collection say where a video lies, and what is seen in it.

    Attributes:
        columns: by these its tables are known; nothing else of a row is needed.
        caption: the one with the caption.
        path: the path that a row's cells give, as the collection's own tool for downloads names the file.
        cut: its files are the pieces: times in its tables are those of longer videos.
    """

    columns: frozenset[str]
    caption: str
    path: Callable[[Mapping[str, Any]], Any]
    cut: bool = False

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its `path` and its `caption`."""
        return {**row, "path": self.path(row), "caption": row.get(self.caption)}


def _named(row: Mapping[str, Any], column: str) -> str | None:
    return None if row.get(column) in (None, "") else f"{row[column]}.mp4"


def _in_page(row: Mapping[str, Any]) -> str | None:
    folder, name = row.get("page_dir"), _named(row, "videoid")
    return f"{folder}/{name}" if name is not None and isinstance(folder, str) and folder.strip() else name


_COLLECTIONS = (
    Collection(frozenset({"videoid", "name", "page_dir"}), "name", _in_page),  # WebVid
    Collection(
        frozenset({"videoID", "url", "timestamp", "caption", "matching_score"}),  # Panda-70M
        "caption",
        lambda row: _named(row, "videoID"),
    ),
    Collection(
        frozenset({"clip_id", "file_path", "timestamp", "framestamp", "dense_caption"}),  # MiraData
        "dense_caption",
        lambda row: row.get("file_path"),
        cut=True,
    ),
)


def collection_of(columns: Sequence[str]) -> Collection | None:
    """The collection that a table of these columns is of, None where it is of none."""
    return next((known for known in _COLLECTIONS if known.columns <= set(columns)), None)


def beside(video: Path) -> dict[str, Any]:
    """The fields of the JSON file of a video's name beside it; none where there is none.

    Raises:
        DataError: it is no JSON object; the message starts with the file's name.
    """
    path = video.with_suffix(".json")
    try:
        text = read_utf8(path)
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name} is not JSON ({error.msg} in line {error.lineno})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path.name} is not an object, expected {{...}}")
    return found
