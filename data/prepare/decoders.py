"""Processes that decode videos while the device encodes.

Process w of W decodes videos w, w + W, …, and sends clips through a pipe, which holds it back until they are taken: one
clip waits in each process, and a few in the queue of `prefetch`. So memory is bounded, the order is that of the videos
whatever W is, and nothing stays behind when all is killed. A process is told of a video while it has another in work.
One that dies takes one video with it, not the run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data.errors import DataError
from data.prepare.clip_places import Passed
from data.prepare.clip_rules import ALL, Rules
from data.prepare.scaling import Size
from data.prepare.video import Clip, read_clips

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A video to decode: its number, where it lies, the numbers of its clips that are not needed, and the piece of it
    that is meant, in seconds."""

    row: int
    path: Path
    skip: Collection[int]
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class End:
    """A video's end: how many of its clips there are, the reason when the file is bad, and how much of it is not taken
    and why, by the keys of `data.prepare.clip_rules.REASONS`."""

    row: int
    clips: int
    reason: str | None
    left: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Coming:
    """The message before a clip's frames."""

    index: int
    start: float
    shape: tuple[int, ...]


class Decoders:
    """Decodes videos in `workers` processes; iterate once.

    Args:
        tasks: the videos; each is asked for when its turn comes.
        workers: how many processes.
        fps, frames, sizes, most, rules: as in `read_clips`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        workers: int,
        *,
        fps: float,
        frames: int,
        sizes: Sequence[Size],
        most: int | None,
        rules: Rules = ALL,
    ) -> None:
        self._tasks = tasks
        self._options: dict[str, Any] = {"fps": fps, "frames": frames, "sizes": sizes, "most": most, "rules": rules}
        self._closing, self._closed = threading.Lock(), False
        # Spawned, not forked: a fork of a process whose torch has run threads can hang.
        self._context = multiprocessing.get_context("spawn")
        self._count = min(workers, len(tasks))
        self.workers = [self.start(first) for first in range(self._count)]

    def __iter__(self) -> Iterator[tuple[int, Clip] | End]:
        """(video's number, clip) for each clip and an `End` for each video, in the order of the tasks."""
        count = self._count
        for position in range(len(self._tasks)):
            row, clips = self._tasks[position].row, 0
            while True:
                try:
                    _, connection, line = self.workers[position % count]
                    event = _receive(connection)
                    if not isinstance(event, Clip):
                        self._tell(line, position + 2 * count)
                except (EOFError, OSError):
                    process, *connections = self.workers[position % count]
                    process.join()
                    for connection in connections:
                        connection.close()
                    with self._closing:
                        if self._closed:
                            return
                        self.workers[position % count] = self.start(position + count)
                    event = (clips, f"the decoder died ({_death(process.exitcode)})", {})
                if isinstance(event, Clip):
                    clips += 1
                    yield row, event
                else:
                    yield End(row, *event)
                    break

    def close(self) -> None:
        """Stop the processes; who waits for the next clip meanwhile, in a thread, finds the end."""
        with self._closing:
            self._closed = True
            workers = list(self.workers)
        for process, *_ in workers:
            process.terminate()
        for process, *_ in workers:
            process.join()

    def start(self, first: int) -> tuple[Any, Connection, Connection]:
        """A process that decodes its videos from the one at `first` on, and this end of the pipes of its clips and of
        its tasks."""
        ours, theirs = self._context.Pipe(duplex=False)
        told, line = self._context.Pipe(duplex=False)
        process = self._context.Process(target=decode, args=(theirs, told, self._options), daemon=True)
        process.start()
        theirs.close()
        told.close()
        for position in (first, first + self._count):
            self._tell(line, position)
        return process, ours, line

    def _tell(self, line: Connection, position: int) -> None:
        """Pass on the task at a position, or that there are no more."""
        with contextlib.suppress(OSError):  # the process has died, which is noticed where its clips are missing
            line.send(self._tasks[position] if position < len(self._tasks) else None)


def decode(connection: Connection, line: Connection, options: dict[str, Any]) -> None:
    """The life of a decoding process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        for task in _tasks_of(line):
            clips, reason = 0, None
            left: Counter[str] = Counter()
            try:
                for clip in read_clips(task.path, skip=task.skip, start=task.start, end=task.end, **options):
                    if isinstance(clip, Passed):
                        left[clip.why] += 1
                        continue
                    connection.send(_Coming(clip.index, clip.start, clip.frames.shape))
                    send_frames(connection, clip.frames)
                    clips += 1
                    del clip  # the next one is made before the loop would let go of it
            except DataError as error:
                reason = str(error)
            connection.send((clips, reason, dict(left)))


def _tasks_of(line: Connection) -> Iterator[Task]:
    with contextlib.suppress(EOFError):  # the parent is gone
        while (task := line.recv()) is not None:
            yield task


def _receive(connection: Connection) -> Clip | tuple[int, str | None, dict[str, int]]:
    message = connection.recv()
    if not isinstance(message, _Coming):
        return message
    frames = np.empty(message.shape, np.uint8)
    room = frames.data.cast("B")
    while room:
        count = os.readv(connection.fileno(), [room])
        if not count:
            raise EOFError
        room = room[count:]
    return Clip(message.index, message.start, frames)


def send_frames(connection: Connection, frames: np.ndarray) -> None:
    """Pass frames through the pipe as they are: the connection's own way collects them in a second place first, which
    takes several times as long."""
    content = frames.data.cast("B")
    while content:
        content = content[os.write(connection.fileno(), content) :]


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items, up to `depth` of them taken ahead in a thread, which ends with this or with the next item."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0.1)
                return True
        return False

    def fill() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            good, item = waiting.get()
            if not good:
                if item is not None:
                    raise item
                return
            yield item
    finally:
        stopped.set()
