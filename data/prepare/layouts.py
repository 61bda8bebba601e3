"""How common collections of videos are laid out: names of columns, lists inside folders, files beside the videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.io.lines import lines_of, read_utf8

PATHS = ("path", "video", "video_path", "file", "file_name", "filename", "file_path", "media_path", "videos")
CAPTIONS = ("caption", "text", "prompt")
"""The usual names of the columns of paths and captions; the first that is there is taken."""

WEB_VID = ("videoid", "name", "page_dir")
"""The columns by which WebVid's tables are known."""

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
VIDEOS, PROMPTS = "videos.txt", ("prompts.txt", "prompt.txt", "captions.txt")


def table_in(folder: Path) -> Path | None:
    """The table that a folder carries as Hugging Face's video folders do, or None."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


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


def web_vid(columns: Sequence[str]) -> bool:
    """Whether a table is WebVid's: files are named by `page_dir` and `videoid`, captions are in `name`."""
    return set(WEB_VID) <= set(columns)


def web_vid_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of WebVid's with its path and its caption."""
    folder = row.get("page_dir")
    known = isinstance(folder, str) and folder.strip()
    return {
        **row,
        "path": f"{folder}/{row['videoid']}.mp4" if known else f"{row['videoid']}.mp4",
        "caption": row["name"],
    }


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
