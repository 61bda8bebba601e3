"""``python -m launch cancel``: ends a run, or all runs of a sweep, in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.records import job_of
from launch.slurm_jobs import UNKNOWN, queued, running_steps, slurm_state
from radial.cli.command import Command
from radial.cli.settings import setting
from train.errors import UserError
from train.storage.run_folder import command, get_state, holder, set_state
from train.storage.sweep_folder import SweepFolder, is_sweep


@dataclass
class Options:
    """What ends, and how."""

    run: Path = setting("the run folder, or the folder of a sweep: all of its runs")
    now: bool = setting("end at once and keep the last checkpoint", False)


def cancel(options: Options) -> None:
    """Ends what runs or waits in the folder, and prints how to go on.

    Raises:
        UserError: nothing does, or it cannot be ended from here.
    """
    folder, now = options.run, options.now
    if not is_sweep(folder):
        cancel_run(folder, now)
        print(f"{command('train resume=', folder)} goes on")
        return
    cancel_sweep(folder, now)
    print(f"{command('train -m resume=', folder)} goes on")


def cancel_run(folder: Path, now: bool) -> None:
    """Ends the run in a folder: its SLURM job, or the process on this machine.

    Raises:
        UserError: there is none, or it cannot be ended from here.
    """
    job, who = job_of(folder), holder(folder)
    state = slurm_state(job) if job else ""
    if state.startswith(UNKNOWN):
        raise UserError(f"job {job}: {state}; try again when SLURM answers")
    if job and state:
        _cancel_job(folder, job, state, now)
    elif who is None:
        raise UserError(f"{folder}: nothing runs there")
    else:
        _end_process(folder, who, now)


def cancel_sweep(folder: Path, now: bool) -> None:
    """Ends the process that runs a sweep on this machine, and with it the run that is on; else the sweep's jobs.

    Raises:
        UserError: nothing of it runs or waits.
    """
    who = holder(folder)
    if who is not None:
        _end_process(folder, who, now)
        if not now:
            return  # it passes the signal on
    sweep = SweepFolder.read(folder)
    active = [sweep.run(number) for number in sweep.unfinished()]
    active = [run for run in active if holder(run) is not None or queued(job_of(run))]
    if not active and who is None:
        raise UserError(f"{folder}: none of its runs is running or in the queue")
    for run in active:
        cancel_run(run, now)


def _cancel_job(folder: Path, job: str, state: str, now: bool) -> None:
    # SIGINT goes to the job's step and not to the script, which then sees that the user wanted the end; while it still
    # checks the nodes there is no run that could save anything. Nor does it go to the job: of an array's task scancel
    # cannot see that the signal has arrived, and repeats it every few seconds, which ends a run without a checkpoint.
    starting = get_state(folder)[0] == "starting"
    waiting = starting or not state.startswith("RUNNING")
    words = [job] if now or waiting else ["--signal=INT", *running_steps(job)]
    done = subprocess.run(["scancel", *words], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        raise UserError(f"scancel of job {job}: {' '.join(done.stderr.split())}")
    if starting:
        set_state(folder, "stopped", "its job was cancelled before it had begun")
    print(f"job {job} {'is cancelled' if now or waiting else 'saves a checkpoint and ends'}")


def _end_process(folder: Path, who: dict[str, Any], now: bool) -> None:
    if who["host"] != socket.gethostname():
        raise UserError(f"{folder}: process {who['pid']} runs on {who['host']}, cancel it there")
    try:
        os.kill(who["pid"], signal.SIGKILL if now else signal.SIGINT)
    except OSError as error:  # another user's, or it has ended in this moment
        raise UserError(f"{folder}: process {who['pid']}: {error.strerror}") from error
    print(f"process {who['pid']} {'is killed' if now else 'saves a checkpoint and ends'}")


main = Command(
    "python -m launch cancel",
    "Asks a run to save a checkpoint and end; it is not queued again. A waiting job leaves the queue.",
    Options,
    cancel,
    ["python -m launch cancel runs/wan_4x/<time>"],
    positional="run",
)
