"""Which of the listed videos qualify, by their headers: from the best down, until as many are chosen as wanted."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.errors import DataError
from data.prepare.chosen import ChosenVideos, Rejected
from data.prepare.conditions import Condition
from data.prepare.duplicates import Duplicates, fingerprint_of
from data.prepare.listed import Candidate, NoVideosError, name_of
from data.prepare.packed import packed
from data.prepare.rows import Row, Rows
from data.prepare.scaling import Size, nearest_size
from data.prepare.selection import Candidates
from data.prepare.video import VideoInfo, probe


class Aside(Enum):
    """Why a video is neither chosen nor bad."""

    UNFIT = "does not meet the conditions, or is too short"
    MISSING = "is not on disk"


@dataclass(frozen=True)
class Wanted:
    """What a video has to be to be chosen.

    Attributes:
        fps, frames, clips: pace and length of a clip, and the most from one video (None: all).
        sizes: the buckets.
        upscale: take videos that are smaller than their bucket, enlarged.
        min_fps: take no video of fewer frames a second; None takes all, their frames repeated.
        top: how many videos; None takes all.
        dedup: take no video that is there already.
    """

    fps: float
    frames: int
    clips: int | None
    sizes: Sequence[Size]
    upscale: bool
    min_fps: float | None
    top: int | None
    dedup: bool = False


def choose_videos(
    arguments: dict[str, Any],
    candidates: Candidates,
    wanted: Wanted,
    *,
    before: ChosenVideos | None = None,
    progress: bool = False,
) -> ChosenVideos:
    """Choose the first candidates that hold a clip and meet the conditions on their headers.

    Headers are read from the best video down, and only until enough are found. Where bad files are all there is,
    there are no rows.

    Args:
        arguments: kept with the videos.
        candidates: from `select`.
        wanted: what a video has to be.
        before: what was chosen earlier by the same arguments: the videos that it knows are judged as they were.
        progress: show a progress bar on stderr.

    Raises:
        NoVideosError: no video is left, and none is bad.
    """
    matching = candidates.matching
    rows = Rows()
    chosen = array("q")  # of the candidates
    rejected: list[Rejected] = []
    unfit: list[str] = []
    lost: list[str] = []
    twins: list[tuple[str, str]] = []
    compromises, duplicates = _Compromises(wanted), Duplicates()
    for row in before.rows if before else []:
        if row.look:
            duplicates.twin(row.name, row.look)
    most = len(matching) if wanted.top is None else wanted.top
    with tqdm(total=min(most, len(matching)), disable=not progress) as bar:
        bar.set_description("choosing")
        for number, (video, info, found) in enumerate(_judged(candidates, wanted, before)):
            if len(rows) == most:
                break
            twin = duplicates.twin(found.name, found.look) if isinstance(found, Row) and found.look and info else None
            if twin is not None:
                twins.append((name_of(video), twin))
            elif isinstance(found, Row):
                rows.append(found)
                chosen.append(number)
                if info is not None:
                    compromises.add(found.name, info)
                bar.update()
            elif isinstance(found, Rejected):
                rejected.append(found)
            else:
                (unfit if found is Aside.UNFIT else lost).append(name_of(video))
    passed = candidates.listed - len(matching) + len(unfit) + len(twins)
    told = list(candidates.told)
    if lost:
        some = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        told.append(f"{len(lost)} of the listed videos are not in {candidates.root}, such as {some}")
    if not rows and not rejected:
        hint = "; correct videos= or download them" if lost else ""
        raise NoVideosError(
            f"{candidates.about}: no video of {wanted.frames} frames at {wanted.fps:g} fps is left of "
            f"{candidates.listed}: {passed} are too short or do not meet the conditions, {len(lost)} are not on disk "
            f"in {candidates.root}, none is bad{hint}"
        )
    if twins:
        told.append(f"duplicates, left out: {len(twins)}, such as {twins[0][0]}, which is {twins[0][1]} once more")
    told += compromises.told()
    rows.caption_all(candidates.found.captions(matching.picked(chosen)))
    return ChosenVideos(arguments, candidates.root, rows, rejected, passed, len(lost), unfit, told)


def _judged(
    candidates: Candidates, wanted: Wanted, before: ChosenVideos | None
) -> Iterator[tuple[Candidate, VideoInfo | None, Row | Rejected | Aside]]:
    """Each candidate with its header where that was read, and as a row, or why it is bad or left out."""
    known: dict[str, Row | Aside] = {}
    if before is not None:
        # Bad files are looked at again: they may have been mended, or got a caption.
        known = {**dict.fromkeys(before.unfit, Aside.UNFIT), **{row.name: row for row in before.rows}}
    root = Path(candidates.root)

    def judge(video: Candidate) -> tuple[VideoInfo | None, Row | Rejected | Aside]:
        there = known.get(name_of(video))
        if isinstance(there, Row):
            return None, there
        found = _probed(root, video) if there is None else there
        if not isinstance(found, VideoInfo):
            return None, found
        row = _row(video, found, wanted, candidates.probed)
        if wanted.dedup and isinstance(row, Row):
            row = replace(row, look=fingerprint_of(root / row.path, row.start, row.end))
        return found, row

    with ThreadPoolExecutor(16) as pool:
        for start in range(0, len(candidates.matching), 64):
            group = candidates.matching[start : start + 64]
            for video, (info, found) in zip(group, pool.map(judge, group), strict=True):
                yield video, info, found


def _probed(root: Path, video: Candidate) -> VideoInfo | Rejected | Aside:
    """The video's header, why it has none that can be used, or that it is not on disk."""
    try:
        video.path.encode()  # it becomes part of the shards
    except UnicodeEncodeError:
        return Rejected(video.path, "file name is not UTF-8; rename it")
    if not video.path:
        return Rejected(video.path, video.problem or "no path")
    try:
        inside = packed(root / video.path)
        (inside[0] if inside else root / video.path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return Aside.MISSING
    except (OSError, ValueError) as error:
        return Rejected(video.path, getattr(error, "strerror", None) or str(error))
    try:
        info = probe(root / video.path)
    except DataError as error:
        return Rejected(video.path, str(error))
    return info if video.problem is None else Rejected(name_of(video), video.problem)


def _row(video: Candidate, info: VideoInfo, wanted: Wanted, probed: Sequence[Condition]) -> Row | Rejected | Aside:
    """The video as a row, still without its caption, or that it does not qualify."""
    try:
        start, end = video.span.seconds(info.fps) if video.span else (0.0, None)
    except DataError as error:
        return Rejected(name_of(video), str(error))
    info = info.within(start, end)
    available = info.frames_at(wanted.fps)
    # A header without a length: decoding finds it.
    count = 1 if available is None else available // wanted.frames
    count = count if wanted.clips is None else min(count, wanted.clips)
    slow = wanted.min_fps is not None and info.fps is not None and info.fps < wanted.min_fps
    small = not wanted.upscale and enlargement(info, wanted.sizes) > 1
    fits = all(condition.holds(_columns(info, wanted.fps)) for condition in probed)
    if not info.may_hold(wanted.frames, wanted.fps) or slow or small or not fits:
        return Aside.UNFIT
    return Row(video.path, "", count, start, end, name_of(video) if video.span else None)


def enlargement(info: VideoInfo, sizes: Sequence[Size]) -> float:
    """By how much a video's sides grow to cover its bucket; below 1 where they shrink."""
    height, width = nearest_size(info.height, info.width, sizes)
    return max(height / info.height, width / info.width)


class _Compromises:
    """Chosen videos that the clips show worse than a model expects: enlarged ones, and those with repeated frames."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._enlarged = self._slow = 0
        self._largest, self._slowest = (1.0, "", ""), (math.inf, "")

    def add(self, path: str, info: VideoInfo) -> None:
        scale = enlargement(info, self._wanted.sizes)
        if scale > 1:
            self._enlarged += 1
            if scale > self._largest[0]:
                height, width = nearest_size(info.height, info.width, self._wanted.sizes)
                self._largest = (scale, path, f"{info.height}x{info.width} to {height}x{width}")
        # Rates are averages: one of 15.98 for 16 repeats a frame in a minute.
        if info.fps is not None and info.fps < 0.99 * self._wanted.fps:
            self._slow += 1
            if info.fps < self._slowest[0]:
                self._slowest = (info.fps, path)

    def told(self) -> list[str]:
        """What is to be said of them, in lines."""
        lines = []
        if self._enlarged:
            scale, path, sides = self._largest
            lines.append(
                f"videos that are enlarged: {self._enlarged}, {path} the most ({sides}, {scale:.2f} times); "
                "upscale=false leaves them out"
            )
        if self._slow:
            fps, path = self._slowest
            lines.append(
                f"videos whose frames are repeated, of fewer than {self._wanted.fps:g} a second: {self._slow}, {path} "
                f"has the fewest ({fps:.4g}); min_fps={self._wanted.fps:g} leaves them out"
            )
        return lines


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
