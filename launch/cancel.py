"""``python -m launch cancel``: ends a run in order."""

from __future__ import annotations

import os
import signal
import socket
import subprocess

from launch.run_folders import job_of, run_argument
from launch.slurm_jobs import UNKNOWN, slurm_state
from train.cli import flag
from train.errors import UserError
from train.storage.run_folder import command, get_state, holder, set_state

USAGE = """python -m launch cancel RUN [now=true]

Asks a run to save a checkpoint and end; it is not queued again. A waiting job leaves the queue.
With now=true it ends at once and keeps its last checkpoint.
"""


def main(arguments: list[str]) -> None:
    """Does it."""
    folder, settings = run_argument(arguments, "now")
    now = flag("now", settings.get("now", "false"))
    job, who = job_of(folder), holder(folder)
    state = slurm_state(job) if job else ""
    if state.startswith(UNKNOWN):
        raise UserError(f"job {job}: {state}; try again when SLURM answers")
    if job and state:
        # SIGINT reaches the processes and not the script, which then sees that the user wanted the end; while it still
        # checks the nodes there is no run to tell
        starting = get_state(folder)[0] == "starting"
        waiting = starting or not state.startswith("RUNNING")
        done = subprocess.run(
            ["scancel", *([] if now or waiting else ["--signal=INT"]), job],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode != 0:
            raise UserError(f"scancel of job {job}: {' '.join(done.stderr.split())}")
        if starting:
            set_state(folder, "stopped", "its job was cancelled before it had begun")
        print(f"job {job} {'is cancelled' if now or waiting else 'saves a checkpoint and ends'}")
    elif who is None:
        raise UserError(f"{folder}: nothing runs there")
    elif who["host"] != socket.gethostname():
        raise UserError(f"{folder}: process {who['pid']} runs on {who['host']}, cancel it there")
    else:
        try:
            os.kill(who["pid"], signal.SIGKILL if now else signal.SIGINT)
        except OSError as error:  # another user's, or it has ended in this moment
            raise UserError(f"{folder}: process {who['pid']}: {error.strerror}") from error
        print(f"process {who['pid']} {'is killed' if now else 'saves a checkpoint and ends'}")
    print(f"{command('train resume=', folder)} goes on")
