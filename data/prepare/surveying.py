"""Looking at videos in processes: which clips are in each, what is left out and why, and pictures of some."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import av.error
import numpy as np

from data.errors import DataError
from data.prepare.bars import WHOLE, find_bars
from data.prepare.clip_places import Passed
from data.prepare.clip_rules import Measures
from data.prepare.scaling import reason_of
from data.prepare.video import read_clips

BAD = (DataError, av.error.FFmpegError, OSError, ValueError)
"""What decoding a video that is bad raises."""

DIED = "the process that decodes it died: FFmpeg crashed, or memory ran out"
"""Why a video is bad that cannot be looked at."""


@dataclass
class Survey:
    """What decoding a video showed.

    Attributes:
        taken, left: each clip, or piece that is left out, with its start in seconds.
        pictures: first, middle and last frame of the first clip that is taken, where they are asked for.
        bars: whether it has black bars.
        seconds: that it took.
        reason: why it is bad, where it is.
    """

    taken: list[tuple[float, Measures | None]] = field(default_factory=list)
    left: list[Passed] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    bars: bool = False
    seconds: float = 0.0
    reason: str | None = None


class Job(NamedTuple):
    """A video to look at.

    Attributes:
        row: its number.
        path: where it lies.
        options: of `read_clips`.
        most: so much of it is decoded as shows that many clips; None is all.
        pictures: whether they are needed.
    """

    row: int
    path: Path
    options: dict[str, Any]
    most: int | None
    pictures: bool


def survey(job: Job) -> Survey:
    """Decode a video."""
    found, began = Survey(), time.monotonic()
    try:
        found.bars = find_bars(job.path) != WHOLE
        for event in itertools.islice(read_clips(job.path, measure=True, **job.options), job.most):
            if isinstance(event, Passed):
                found.left.append(event)
                continue
            found.taken.append((event.start, event.measures))
            if job.pictures and not found.pictures:
                last = len(event.frames) - 1
                found.pictures = [event.frames[k].copy() for k in (0, last // 2, last)]
    except BAD as error:
        found.reason = reason_of(error)
    found.seconds = time.monotonic() - began
    return found


def survey_all(jobs: Iterable[Job], workers: int) -> Iterator[tuple[int, Survey]]:
    """Each video's number and survey, in the order in which they are ready; `workers` processes decode.

    One that dies, as FFmpeg crashes or memory runs out, takes its own video with it.
    """
    # Each has a pool of its own, which tells whose video it was. Decoders of `data.prepare.decoders` would send all
    # frames of all clips, and no measures.
    todo, free = iter(jobs), [_process() for _ in range(workers)]
    busy: dict[Future[Survey], tuple[int, ProcessPoolExecutor]] = {}
    try:
        while True:
            for job in itertools.islice(todo, len(free)):
                pool = free.pop()
                busy[pool.submit(survey, job)] = job.row, pool
            if not busy:
                return
            done = wait(busy, return_when=FIRST_COMPLETED).done
            while done:
                future = done.pop()
                row, pool = busy.pop(future)
                try:
                    found = future.result()
                except BrokenProcessPool:
                    pool.shutdown()
                    found, pool = Survey(reason=DIED), _process()
                free.append(pool)
                yield row, found
                del future, found  # and its pictures
    finally:
        for pool in (*free, *(pool for _, pool in busy.values())):
            pool.shutdown()


def _process() -> ProcessPoolExecutor:
    # Spawned, not forked: a fork of a process whose torch has run threads can hang.
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def with_pictures(found: Iterable[tuple[int, Survey]], rows: Sequence[int], most: int) -> dict[int, Survey]:
    """The surveys of the videos of some rows, in their order, with the pictures of at most `most` of them.

    Of each of `most` parts of the rows the first video that has pictures keeps them; those of the others go at once.
    """
    surveys: dict[int, Survey] = {}
    first: dict[int, int] = {}  # row of each part whose video has its pictures
    for row, survey in found:
        surveys[row] = survey
        if survey.pictures:
            part = rows.index(row) * most // len(rows)
            other = first.get(part, row)
            first[part] = min(row, other)
            if row != other:
                surveys[max(row, other)].pictures = []
    return dict(sorted(surveys.items()))
