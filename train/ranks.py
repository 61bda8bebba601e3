"""Which of a run's processes this is, known from the environment before torch.distributed is up."""

from __future__ import annotations

import os


def slurm_tasks() -> int:
    """Tasks of the srun that started this process; 1 outside of any, and where torchrun stands between."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to; of a job array ``<job>_<task>``, since the array's own number may
    also be that of one of its tasks."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def speaks_for_node() -> bool:
    """Whether this process tells what all of its node find alike before they train: the first that srun or torchrun
    started there. One that Lightning started is asked alone: the first has been there before it."""
    if slurm_tasks() > 1:
        return os.environ.get("SLURM_LOCALID", "0") == "0"
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def global_rank() -> int:
    """The rank over all nodes: of srun, of torchrun, or of Lightning's own launcher on one machine."""
    if slurm_tasks() > 1:
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def world_size() -> int:
    """Processes over all nodes that srun or torchrun started; 1 for one that was started by itself."""
    tasks = slurm_tasks()
    return tasks if tasks > 1 else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The rank among its node's processes."""
    if slurm_tasks() > 1:
        return int(os.environ["SLURM_LOCALID"])
    return int(os.environ.get("LOCAL_RANK", 0))
