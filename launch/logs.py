"""``python -m launch logs``: what a job has printed, or the log of a run on this machine."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launch.records import job_of
from launch.slurm_jobs import slurm_state
from launch.status import standing
from radial.cli.command import Command
from radial.cli.settings import at_least, setting
from train.errors import UserError
from train.storage.run_folder import holder
from train.storage.sweep_folder import OUTPUT, SweepFolder, is_sweep

ASK_EVERY = 3.0
"""Seconds between two questions to SLURM about a job."""


@dataclass
class Options:
    """Whose output is printed, and how much of it."""

    run: Path = setting("the run folder, or the folder of a sweep: the last lines of each of its runs")
    lines: int = setting("so many of the last lines", 40, must=at_least(0))
    follow: bool = setting("print what comes until the run ends or Ctrl-C", False)


def show(options: Options) -> None:
    """Prints the lines.

    Raises:
        UserError: there is no output yet.
    """
    folder, follow, count = options.run, options.follow, options.lines
    if is_sweep(folder):
        if follow:
            raise UserError(f"follow is true and {folder} is a sweep, expected one of its runs, such as {folder / '0'}")
        _show_sweep(SweepFolder.read(folder), count)
        return
    job = job_of(folder)
    file = log_file(folder, job)
    if follow and job and holder(folder) is None and not _output_of(folder, job).exists():
        file = _output_of(folder, job)  # what is there is of an earlier start
    with contextlib.suppress(KeyboardInterrupt):
        if follow and not file.exists():
            print(f"waiting for {file}{f': job {job} is {slurm_state(job)}' if job else ''}", flush=True)
        while follow and not file.exists() and _goes_on(folder, job):
            time.sleep(ASK_EVERY)
        if not file.exists():
            file = log_file(folder, job)
        if not file.exists():
            waits = f": SLURM job {job} has not started" if job else ""
            raise UserError(f"{folder} has no output yet{waits}")
        _show(file, count, (lambda: _goes_on(folder, job)) if follow else None)


def _show_sweep(sweep: SweepFolder, count: int) -> None:
    """The last lines of every run that has any, each under its folder, as ``tail`` does with several files."""
    for number in range(len(sweep.settings)):
        folder = sweep.run(number)
        file = log_file(folder, job_of(folder))
        print(f"==> {folder} ({sweep.label(number)}) <==")
        if file.exists():
            _show(file, count, None)
        else:
            print("no output yet")
        print()


def _goes_on(folder: Path, job: str | None) -> bool:
    """Whether more will come: a job that waits to go on is in SLURM's queue."""
    return slurm_state(job) != "" if job else standing(folder)[0] in ("new", "starting", "running")


def has_reader(descriptor: int = 1) -> bool:
    """Whether what is printed goes anywhere: the terminal is open, and what reads the pipe, such as ``head``, runs."""
    output = select.poll()
    output.register(descriptor, 0)
    return not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))


def log_file(folder: Path, job: str | None) -> Path:
    """The file with the output of the run's last start: that of the job that runs it, else the newest of what SLURM, a
    sweep or the run itself wrote.

    Args:
        folder: of the run.
        job: as `launch.records.job_of`.
    """
    own = [folder / OUTPUT, folder / "log.txt"]
    if holder(folder) is None:
        own = [*folder.glob("slurm-*.out"), *own]
    elif job and _output_of(folder, job).exists():
        return _output_of(folder, job)
    there = [file for file in own if file.exists()]
    return max(there, key=lambda file: file.stat().st_mtime) if there else own[-1]


def _output_of(folder: Path, job: str) -> Path:
    return folder / f"slurm-{job}.out"


def _show(file: Path, count: int, goes_on: Callable[[], bool] | None) -> None:
    with file.open(encoding="utf-8", errors="replace") as stream:
        # a progress line is written over itself
        lines = [line.rstrip("\n").split("\r")[-1] for line in stream]
        print("\n".join(lines[-count:] if count else []), flush=True)
        ends, asked = goes_on is None, time.monotonic()
        while goes_on is not None:
            text = stream.read()
            if not has_reader():
                return
            sys.stdout.write(text)
            sys.stdout.flush()
            if text:
                continue
            if ends:
                return  # after its last words
            time.sleep(0.5)
            if time.monotonic() - asked > ASK_EVERY:
                ends, asked = not goes_on(), time.monotonic()


main = Command(
    "python -m launch logs",
    "The last lines of what a SLURM job printed; of a run on this machine, those of log.txt in its folder: every "
    "rank's warnings, and how it ended. Its figures are in metrics.csv.",
    Options,
    show,
    ["python -m launch logs runs/wan_4x/<time> follow=true"],
    positional="run",
)
