"""Which of a run's processes this is, known from the environment before torch.distributed is up."""

from __future__ import annotations

import os


def slurm_tasks() -> int:
    """Tasks of the srun that started this process; 1 outside of any."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_STEP_ID" in os.environ else 1


def global_rank() -> int:
    """The rank over all nodes: of srun, of torchrun, or of Lightning's own launcher on one machine."""
    if slurm_tasks() > 1:
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
