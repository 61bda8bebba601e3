"""What SLURM says of a job."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from train.errors import UserError
from train.storage.run_folder import command

UNKNOWN = "UNKNOWN"
"""First word of `slurm_state` while SLURM does not answer."""


def slurm_state(job: str) -> str:
    """State and reason of a job, such as ``RUNNING`` or ``PENDING (Resources)``; empty when SLURM has forgotten it."""
    try:
        out = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T (%r), starts %S"],
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


def check_not_queued(folder: Path, job: str | None) -> None:
    """Nothing is submitted or started beside a job that will run in the same folder.

    Raises:
        UserError: there is one.
    """
    if job is None or shutil.which("squeue") is None:
        return
    state = slurm_state(job)
    if state and not state.startswith(("COMPLETING", UNKNOWN)):
        raise UserError(
            f"job {job} of {folder} is still in the queue ({state}): wait for it, or end it first with "
            f"{command('launch cancel ', folder)}"
        )
