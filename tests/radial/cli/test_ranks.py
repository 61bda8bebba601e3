"""Which process this is, by what torchrun, srun or Lightning set."""

import pytest

from radial.cli.ranks import Rank, slurm_job

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS",
         "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID",
         "SLURM_ARRAY_TASK_ID")  # fmt: skip
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "rank", "first"),
    [
        ({}, Rank(0, 1, 0, ""), True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Rank(0, 1, 0, ""), True),  # a batch script
        (SRUN, Rank(9, 16, 1, "srun"), False),
        (SRUN | {"SLURM_LOCALID": "0"}, Rank(9, 16, 0, "srun"), True),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Rank(0, 1, 0, ""), True),
        (TORCHRUN, Rank(3, 5, 2, "torchrun"), False),
        (SRUN | TORCHRUN, Rank(3, 5, 2, "torchrun"), False),  # torchrun within srun
        ({"LOCAL_RANK": "1"}, Rank(1, 1, 1, "lightning"), True),  # only the first process is refused something
    ],
)
def test_ranks_come_from_the_environment(environment, rank, first, monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == rank
    assert rank.first_of_node == first


def test_a_task_of_a_job_array_has_a_job_of_its_own(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm_job() == "8"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job() == "7_2"
