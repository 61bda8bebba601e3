"""The parts of a study, one after the other or several at the same time: each process has its own, and one GPU.

<out>/logs/<part>.log    what a part prints where several run
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from radial.errors import Mistake
from train.errors import UserError
from train.shards import training_shards, validation_shards
from train.study.gpus import OneGpuEach, gpus_in_turn
from train.study.parts import Part, held_out_shards
from train.study.rows import Row
from train.study.runs import Clock, TimeUp
from train.study.settings import Job

Done = Callable[[Row, Mistake | None], None]
"""Called after each part with its row; with what is wrong where it could not be done."""


def do_parts(job: Job, parts: Iterator[Part], clock: Clock, done: Done) -> None:
    """Does all parts, ``job.given.processes`` of them at a time.

    Args:
        parts: asked for the next one when a process is free.

    Raises:
        TimeUp: the time is over; finished parts have been reported.
        SystemExit: a signal has stopped them.
        UserError: one of the processes was killed.
    """
    if job.given.processes > 1:
        _in_processes(job, parts, clock, done)
        return
    for part in parts:
        print(f"\n{part.words}", flush=True)
        try:
            part.do(job, clock)
        except Mistake as error:
            done(part.row, error)
        else:
            done(part.row, None)


def _in_processes(job: Job, parts: Iterator[Part], clock: Clock, done: Done) -> None:
    clock.check()
    for seed in job.seeds:  # once, before several processes want them at once
        config = replace(job.config, seed=seed)
        training_shards(config)
        validation_shards(config)
    held_out_shards(job)
    (job.out / "logs").mkdir(exist_ok=True)
    running: dict[Future[None], Part] = {}
    late = False
    threads = max(1, torch.get_num_threads() // job.given.processes)
    spawn = OneGpuEach(gpus_in_turn(job.given.processes))
    executor = ProcessPoolExecutor(job.given.processes, spawn, torch.set_num_threads, (threads,))
    with signals_reach_all(), executor as pool:
        while True:
            while not late and len(running) < job.given.processes and (part := next(parts, None)) is not None:
                log = job.out / "logs" / f"{part.name}.log"
                print(f"{part.words}: begun, {log}", flush=True)
                running[pool.submit(_logged, job, part, clock, log)] = part
            if not running:
                break
            for one in wait(running, return_when=FIRST_COMPLETED).done:
                late = _ended(one, running.pop(one), done) or late
    if late:
        raise TimeUp


def _ended(one: Future[None], part: Part, done: Done) -> bool:
    """Reports a part that has ended; whether the time was over before it was done."""
    try:
        one.result()
    except TimeUp:
        return True
    except Mistake as error:
        done(part.row, error)
    except BrokenProcessPool as error:
        raise UserError(
            f"a process was killed while this ran: {part.words}; for its memory perhaps: the same command goes on, "
            "with fewer processes= where memory is short"
        ) from error
    else:
        print(f"{part.words}: done", flush=True)
        done(part.row, None)
    return False


def _logged(job: Job, part: Part, clock: Clock, log: Path) -> None:
    """A part in a process of its own, which writes to a file."""
    with log.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        part.do(job, clock)


@contextmanager
def signals_reach_all() -> Iterator[None]:
    """A signal that ends this process goes to the others first, which save their checkpoints; nohup and its like, which
    ignore SIGHUP, are let be."""

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)
        raise SystemExit(128 + number)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    taken = (signal.SIGTERM,) if ignored else (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
