"""Whether the job's script queues a run again after it has ended, with a SLURM of three shell scripts."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from launch import doctor
from train.storage.run_folder import TIME_UP, set_state

TEMPLATE = Path(doctor.__file__).with_name("template.sbatch")


@pytest.fixture
def start(folder, tmp_path, monkeypatch):
    """Runs the script; the run in it is the given line of bash, and what comes back is whether it was queued again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = TEMPLATE.read_text(encoding="utf-8").replace("RUN=runs/wan_4x/CHANGE_ME", f"RUN={folder}")
    (tmp_path / "job.sbatch").write_text(text, encoding="utf-8")

    def started(does: str) -> bool:
        asked = tmp_path / "requeued"
        asked.unlink(missing_ok=True)
        for name, line in (
            ("scontrol", f'if [ "$1" = requeue ]; then echo "$2" > {asked}; fi'),
            ("srun", f'case "$*" in *" -m train "*) cd {folder} && {does} ;; esac'),
        ):
            (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(["bash", tmp_path / "job.sbatch"], capture_output=True, encoding="utf-8")
        told = re.search("not queued again|it had ended before: |(done|stopped), newest checkpoint", done.stdout)
        assert done.stderr == "" and asked.exists() != bool(told), done.stdout + done.stderr
        return asked.exists()

    return started


@pytest.mark.parametrize(
    ("does", "again"),
    [
        ("echo requeue > state", True),
        (f"touch {TIME_UP}; echo requeue > state", False),
        (f"touch {TIME_UP}; echo requeue > state; mkdir -p checkpoints/step-000002", True),
        ("echo running > state", False),
        ("echo running > state; mkdir -p checkpoints/step-000002", True),
    ],
    ids=["preempted", "time up", "time up, saved", "killed", "killed, saved"],
)
def test_a_run_without_a_checkpoint_is_queued_again_only_after_a_preemption(folder, start, does, again):
    set_state(folder, "running")
    assert start(does) == again


@pytest.mark.parametrize("saves", ["mkdir step-000002", "rmdir step-000003 && mkdir step-000003"])
def test_a_run_that_went_back_past_a_damaged_checkpoint_has_gone_on_when_it_saves_an_earlier_one(folder, start, saves):
    for step in (1, 3):
        (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert not start("echo running > state")
    assert start(f"echo running > state; cd checkpoints; {saves}")


@pytest.mark.parametrize("state", ["done", "stopped"])
def test_a_job_that_had_ended_does_nothing_when_slurm_starts_it_again(folder, start, monkeypatch, state):
    """SLURM does so when it loses the node in that moment; a later job of the same run is another matter."""
    (folder / ".ended-7").write_text(f"{state}\n", encoding="utf-8")
    for step, (job, count, runs) in enumerate((("7", "1", False), ("8", "1", True), ("7", "0", True))):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        assert start(f"echo running > state; mkdir -p checkpoints/step-{step:06d}") == runs


def test_a_job_that_ends_leaves_word_of_it(folder, start):
    assert not start("echo stopped > state; mkdir -p checkpoints/step-000002")
    assert (folder / ".ended-7").read_text(encoding="utf-8") == "stopped\n"


def test_the_last_rank_may_write_the_report_for_as_long_as_it_takes(folder, start):
    """By itself srun takes the cluster's WaitTime, and after that kills what still runs once a first rank has ended."""
    set_state(folder, "running")
    assert start('case " $* " in *" --wait=0 "*) mkdir -p checkpoints/step-000002 ;; esac')
