"""SLURM's own commands: submitting a script, the state of a job, time limits and partitions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from train.errors import UserError
from train.storage.run_folder import command

UNKNOWN = "UNKNOWN"
"""First word of `slurm_state` while SLURM does not answer."""
_WAITS_FOR_EVER = ("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints", "InvalidQOS",
                   "InvalidAccount")  # fmt: skip


def slurm_state(job: str) -> str:
    """State and reason of a job, such as ``RUNNING`` or ``PENDING (Resources)``; empty when SLURM has forgotten it.

    Args:
        job: its number; of a task of a job array ``<number>_<task>``.

    Raises:
        UserError: this machine has no squeue.
    """
    try:
        out = subprocess.run(
            ["squeue", "-h", "-r", "-j", job, "-o", "%T (%r), starts %S"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError as error:
        raise UserError(
            f"job {job}: {error.filename} is not on this machine, ask on the cluster's login node"
        ) from error
    if out.returncode != 0 and "Invalid job id" not in out.stderr:
        return f"{UNKNOWN} (squeue: {' '.join(out.stderr.split())})"
    return out.stdout.strip().replace(" (None)", "")


def running_steps(job: str) -> list[str]:
    """The steps that srun has started in a running job, such as ``["7.1"]``; of an array's task ``["7_2.1"]``.

    Args:
        job: its number; of a task of a job array ``<number>_<task>``.

    Raises:
        UserError: none runs.
    """
    out = subprocess.run(
        ["squeue", "-h", "--steps", "-j", job, "-o", "%i"], capture_output=True, encoding="utf-8", errors="replace"
    )
    # SLURM's own are named: .batch for the script, .extern for what it keeps beside it
    steps = [step for step in out.stdout.split() if step.rpartition(".")[2].isdigit()]
    if not steps:
        said = f": {' '.join(out.stderr.split())}" if out.stderr.strip() else ""
        raise UserError(f"job {job} runs, but no step of it{said}; it begins or ends just now: try again in a moment")
    return steps


def queued(job: str | None) -> str:
    """The state of a job that waits or runs; empty of any other, and where SLURM cannot be asked."""
    if job is None or shutil.which("squeue") is None:
        return ""
    state = slurm_state(job)
    return "" if state.startswith(("COMPLETING", UNKNOWN)) else state


def check_not_queued(folder: Path, job: str | None) -> None:
    """Makes sure that nothing is submitted or started beside a job that will run in the same folder.

    Raises:
        UserError: there is one.
    """
    state = queued(job)
    if state:
        raise UserError(
            f"job {job} of {folder} is still in the queue ({state}): wait for it, or end it first with "
            f"{command('launch cancel ', folder)}"
        )


def submit(script: Path, again: str) -> str:
    """Submits a script and returns the number of its job.

    Args:
        again: the command that submits the same with other options, for messages.

    Raises:
        UserError: SLURM refuses it, or lets it wait for what it will never get; with SLURM's own words.
    """
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(
            f"SLURM refuses the job: {reason}. {_cluster()}. The script is {script}; {again} submits it with other "
            "options"
        )
    number = done.stdout.strip().split(";")[0]
    why = _pending_reason(number)
    if why in _WAITS_FOR_EVER:
        subprocess.run(["scancel", number])
        raise UserError(
            f"SLURM took job {number}, but it would wait for ever: {why}. {_cluster()}. The job is cancelled; "
            f"{again} submits it with other options"
        )
    return number


def _pending_reason(number: str) -> str:
    out = subprocess.run(
        ["squeue", "-h", "-j", number, "-o", "%r"], capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    return out.partition("\n")[0].strip()  # all tasks of an array wait for the same


def _cluster() -> str:
    """The partitions in words."""
    out = subprocess.run(
        ["sinfo", "-h", "-o", "%P|%D|%l|%G"], capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    parts = [line.strip().split("|") for line in out.splitlines()]
    said = [f"{name.rstrip('*')} ({nodes} nodes, time {limit}, {gres})" for name, nodes, limit, gres in parts]
    return f"This cluster's partitions: {', '.join(said)}".replace("(null)", "no GPUs")


def bytes_of(memory: str) -> float | None:
    """A size as sbatch's ``--mem`` takes it, in MiB where it has no unit; None for all of a node's, which is 0.

    Raises:
        UserError: something else.
    """
    found = re.fullmatch(r"(\d+)([KMGT]?)B?", memory, re.IGNORECASE)
    if found is None:
        raise UserError(f"memory is {memory!r}, expected a node's, such as 512G or 500000 (MiB); 0 is all there is")
    return float(found[1]) * 1024 ** (1 + "KMGT".index(found[2].upper() or "M")) or None


def seconds_of(time: str) -> int:
    """A time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: something else.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise UserError(f"time is {time!r}, expected one such as 90 (minutes), 12:00:00 or 1-00:00:00")
    days, dash, rest = time.rpartition("-")
    numbers = [int(word) for word in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
