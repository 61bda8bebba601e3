"""The processes that decode: one that dies, and stopping them all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.prepare import decoders
from data.prepare.decoders import Decoders, End, Task, prefetch
from tests.helpers.videos import number_of


def dying(path: Any, **options: Any) -> Any:
    """`read_clips` in a process that dies at the second video, as a crash in native code would."""
    from data.prepare.video import read_clips

    if "v1" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return read_clips(path, **options)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes cannot import a test module; forked ones need not."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)


@pytest.mark.usefixtures("forked")
def test_a_decoder_that_dies_takes_one_video_with_it(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "decode", _patched(decoders.decode))
    tasks = [Task(i, videos / f"v{i}.mp4", ()) for i in range(4)]
    running = Decoders(tasks, 2, fps=16, frames=10, sizes=[(16, 32)], most=1)
    try:
        events = list(running)
    finally:
        running.close()
    ends = {event.row: event.reason for event in events if isinstance(event, End)}
    assert ends == {0: None, 1: "the decoder died (SIGKILL)", 2: None, 3: None}


@pytest.mark.usefixtures("forked")
def test_half_a_clip_is_none(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decoder that dies while it sends one that is larger than a pipe; the next video's clips arrive whole."""
    send = decoders.send_frames

    def half(connection: Any, frames: np.ndarray) -> None:
        if number_of(frames[0]) == 40 + 10:
            os.write(connection.fileno(), frames.data.cast("B")[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        send(connection, frames)

    monkeypatch.setattr(decoders, "send_frames", half)
    tasks = [Task(i, videos / f"v{i}.mp4", ()) for i in range(3)]
    running = Decoders(tasks, 1, fps=16, frames=10, sizes=[(128, 192)], most=None)
    try:
        events = list(running)
    finally:
        running.close()
    ends = [event for event in events if isinstance(event, End)]
    assert ends == [End(0, 1, None), End(1, 1, "the decoder died (SIGKILL)"), End(2, 3, None)]
    clips = [event for event in events if not isinstance(event, End)]
    assert [row for row, _ in clips] == [0, 1, 2, 2, 2]
    for row, clip in clips:
        assert [number_of(frame) for frame in clip.frames] == [40 * row + 10 * clip.index + k for k in range(10)]


def _patched(decode: Any) -> Any:
    def run(*arguments: Any) -> None:
        decoders.read_clips = dying  # type: ignore[assignment]
        decode(*arguments)

    return run


class Asked(list[Task]):
    """Tasks, and how many were asked for."""

    most = 0

    def __getitem__(self, position: Any) -> Any:
        self.most = max(self.most, position + 1)
        return super().__getitem__(position)


def test_tasks_are_asked_for_when_their_turn_comes(videos: Path) -> None:
    """Of a million tasks none is made long before it is decoded."""
    tasks = Asked(Task(i, videos / f"v{i % 4}.mp4", ()) for i in range(9))
    running = Decoders(tasks, 2, fps=16, frames=10, sizes=[(16, 32)], most=1)
    try:
        asked = [(event.row, tasks.most) for event in running if isinstance(event, End)]
    finally:
        running.close()
    assert asked == [(row, min(row + 5, 9)) for row in range(9)]


def never(path: Any, **options: Any) -> Iterator[Any]:
    """`read_clips` of a video that takes for ever."""
    time.sleep(600)
    yield


@pytest.mark.usefixtures("forked")
def test_stopping_starts_nothing_and_leaves_no_thread(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits for the next clip does not take the processes' end for a death."""
    monkeypatch.setattr(decoders, "read_clips", never)
    running = Decoders([Task(i, videos / f"v{i}.mp4", ()) for i in range(4)], 2, fps=16, frames=10, sizes=[], most=1)
    started: list[Any] = []
    monkeypatch.setattr(running, "start", started.append)
    before = set(threading.enumerate())
    events = prefetch(iter(running), 2)
    taker = threading.Thread(target=lambda: list(events))
    taker.start()
    while len(set(threading.enumerate()) - before) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    running.close()
    taker.join(20)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
    assert not started and set(threading.enumerate()) <= before
    assert not any(process.is_alive() for process, *_ in running.workers)
