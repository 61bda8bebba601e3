"""Which of a command's processes this is, known from the environment before torch.distributed is up."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """This process among those that were started together.

    Attributes:
        index: over all nodes.
        world: how many there are; 1 of those that Lightning starts itself, which learn it from Lightning.
        local: among those of its node.
        started_by: torchrun, srun, lightning (on one machine, by the first process), or nothing.
    """

    index: int = 0
    world: int = 1
    local: int = 0
    started_by: str = ""

    @classmethod
    def here(cls) -> Rank:
        """The rank of this process, from what its starter has set.

        A batch script that runs outside of srun is alone; torchrun within srun counts.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        if "TORCHELASTIC_RUN_ID" in os.environ:
            starter = "torchrun"
        elif "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            starter, names = "srun", ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
        else:
            starter = "lightning" if "LOCAL_RANK" in os.environ else ""
        index, local, world = (os.environ.get(name) for name in names)
        return cls(int(index or local or 0), int(world or 1), int(local or 0), starter)

    @property
    def first_of_node(self) -> bool:
        """Whether this process prints what all of its node meet alike before they train: the first that srun or
        torchrun started there. One that Lightning started is asked alone: the first has been there before it."""
        return self.local == 0 or self.started_by not in ("torchrun", "srun")


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to; of a job array ``<job>_<task>``, since the array's own number may
    also be that of one of its tasks."""
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")
