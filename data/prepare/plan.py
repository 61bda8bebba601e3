"""What a folder of shards is going to hold: written once, before any clip, and followed by all ranks and restarts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import DataError
from data.files import write_bytes
from data.prepare.sources import Condition, Video, parse_conditions, ranked, read_source, split_conditions
from data.prepare.video import VideoInfo, probe

FILE = "plan.json"


@dataclass(frozen=True)
class Row:
    """A chosen video: the path as listed, its caption, and how many clips its header promises."""

    path: str
    caption: str
    clips: int


@dataclass(frozen=True)
class Rejected:
    """A bad file: the path as listed, why, and how many of its clips were kept."""

    path: str
    reason: str
    kept: int = 0


@dataclass(frozen=True)
class Plan:
    """The chosen videos, numbered by their place, and the bad files that were met while choosing.

    Attributes:
        arguments: what decides the contents of the folder; a folder is only continued with the same.
        root: the folder that the listed paths are relative to.
        rows: the chosen videos.
        rejected: bad files.
        passed: videos that do not meet the conditions or are too short.
    """

    arguments: dict[str, Any]
    root: str
    rows: list[Row]
    rejected: list[Rejected]
    passed: int

    def path(self, row: int) -> Path:
        """Where a chosen video lies."""
        return Path(self.root) / self.rows[row].path

    def save(self, folder: Path) -> None:
        """Write plan.json into `folder`, atomically."""
        write_bytes(folder / FILE, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """The plan in `folder`, or None where there is none yet."""
        try:
            raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        rows, rejected = [Row(**row) for row in raw["rows"]], [Rejected(**entry) for entry in raw["rejected"]]
        return cls(raw["arguments"], raw["root"], rows, rejected, raw["passed"])


@dataclass(frozen=True)
class Candidates:
    """The listed videos that meet the conditions on the list's columns, the best first.

    Attributes:
        about: the list and the conditions, as they are named in errors.
        root: the folder that the listed paths are relative to.
        listed: how many videos the list has.
        matching: those that are left.
        probed: conditions on what the videos' headers say.
    """

    about: str
    root: str
    listed: int
    matching: list[Video]
    probed: list[Condition]


def select(
    *,
    source: Path,
    videos: Path | None,
    path_column: str | None,
    caption_column: str | None,
    where: str | None,
    sort: str | None,
) -> Candidates:
    """Read the list and choose by its columns; no video is opened.

    Args:
        source, path_column, caption_column: as in `read_source`.
        videos: the folder that the paths are relative to; None is the source's own.
        where: conditions, as `parse_conditions` takes them.
        sort: as `ranked` takes it; None keeps the order of the list.

    Raises:
        DataError: as `read_source`, `parse_conditions` and `ranked`.
    """
    listed, columns = read_source(source, path_column, caption_column)
    own, probed = split_conditions(parse_conditions(where) if where else [], columns)
    matching = [video for video in listed if all(condition.holds(video.columns) for condition in own)]
    if sort is not None:
        matching = ranked(matching, sort, columns)
    root = (videos or (source if source.is_dir() else source.parent)).absolute()
    return Candidates(f"{source} with where={where or ''}", str(root), len(listed), matching, probed)


def make_plan(
    arguments: dict[str, Any],
    candidates: Candidates,
    *,
    top: int | None,
    fps: float,
    frames: int,
    clips: int | None,
    progress: bool = False,
) -> Plan:
    """Choose the first `top` candidates that hold a clip and meet the conditions on their headers.

    Headers are read from the best video down, and only until `top` are found. Where bad files are all there is, the
    plan has no rows.

    Args:
        arguments: kept in the plan.
        candidates: from `select`.
        top: how many videos; None takes all.
        fps, frames, clips: pace and length of a clip, and the most from one video.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no video is left, and none is bad.
    """
    matching, probed, root = candidates.matching, candidates.probed, Path(candidates.root)
    rows: list[Row] = []
    rejected: list[Rejected] = []
    wanted = len(matching) if top is None else top
    passed = candidates.listed - len(matching)
    with ThreadPoolExecutor(16) as pool, tqdm(total=min(wanted, len(matching)), disable=not progress) as bar:
        bar.set_description("choosing")
        for start in range(0, len(matching), 64):
            if len(rows) == wanted:
                break
            group = matching[start : start + 64]
            for video, info in zip(group, pool.map(lambda video: _probed(root, video), group), strict=True):
                if len(rows) == wanted:
                    break
                if isinstance(info, str) or video.caption is None:
                    reason = info if isinstance(info, str) else video.uncaptioned
                    rejected.append(Rejected(video.path, reason))
                    continue
                count = _clips_in(info, fps, frames, clips)
                if count == 0 or not all(condition.holds(_columns(info, fps)) for condition in probed):
                    passed += 1
                    continue
                rows.append(Row(video.path, video.caption, count))
                bar.update()
    if not rows and not rejected:
        raise DataError(
            f"{candidates.about}: no video of {frames} frames at {fps:g} fps is left of {candidates.listed}: {passed} "
            "are too short or do not meet the conditions, none is bad"
        )
    return Plan(arguments, str(root), rows, rejected, passed)


def _probed(root: Path, video: Video) -> VideoInfo | str:
    """The video's header, or why it has none that can be used."""
    try:
        video.path.encode()  # it becomes part of the shards
    except UnicodeEncodeError:
        return "file name is not UTF-8; rename it"
    try:
        return probe(root / video.path)
    except DataError as error:
        return str(error)


def _clips_in(info: VideoInfo, fps: float, frames: int, most: int | None) -> int:
    available = info.frames_at(fps)
    # A header without a length: decoding tells.
    count = 1 if available is None else available // frames
    return count if most is None else min(count, most)


def _columns(info: VideoInfo, fps: float) -> dict[str, Any]:
    """What conditions may ask for, under the names of `PROBED`; frames are counted at the clips' pace."""
    return {
        "frames": info.frames_at(fps),
        "seconds": info.seconds,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "aspect": info.width / info.height,
    }
