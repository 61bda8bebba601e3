"""Runs on a real SLURM: two nodes with two processes each, over gloo."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cancel, status
from tests.helpers.slurm import wait_until
from tests.helpers.tiny import words

pytestmark = pytest.mark.slow
STEPS = 24


def launch(slurm, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        env=slurm.environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def submit(slurm, tmp_path, **changes):
    """Submits the run; its folder and its job's number."""
    given = {"trainer__steps": STEPS, "trainer__checkpoint_every": 5, "data__workers": 1, **changes}
    run = words(tmp_path, **given)
    launch(slurm, "slurm", "nodes=2", "processes=2", "cpus=1", "partition=main", "time=30", *run)
    folder = max((tmp_path / "runs" / "shapes_4x").iterdir(), key=lambda path: path.stat().st_mtime)
    return folder, json.loads((folder / "launch.json").read_text(encoding="utf-8"))["job"]


def losses(folder: Path) -> list[tuple[str, str]]:
    """(step, loss) as they are written, to the last digit."""
    file = folder / "metrics.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as stream:
        return [(row["step"], row["loss"]) for row in csv.DictReader(stream) if row.get("loss")]


def wait_for_step(slurm, folder, job, step, seconds=150):
    end = time.monotonic() + seconds
    while len(losses(folder)) < step:
        assert time.monotonic() < end and slurm.state(job) in ("PENDING", "CONFIGURING", "RUNNING"), output(folder)
        time.sleep(0.2)


def output(folder: Path) -> str:
    return "".join(file.read_text(encoding="utf-8") for file in folder.glob("slurm-*.out"))


def starts_again(slurm, folder, job):
    """Waits for a job's second start, without the two minutes for which SLURM lets a job wait that was queued again.

    They are there so that the first start is over: a second one that begins in the second of its end is refused, as
    one whose credential was revoked. So nothing is hurried before the first one's last process is gone.
    """
    slurm.wait(job, "PENDING")
    wait_until(
        lambda: not subprocess.run(["pgrep", "-f", rf"slurmstepd: \[{job}\."], capture_output=True).stdout, seconds=90
    )
    time.sleep(2)
    slurm.run("scontrol", "update", f"jobid={job}", "StartTime=now")
    wait_until(lambda: "start 2" in output(folder), lambda: f"{slurm.state(job)}: {output(folder)}", 120)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """Losses of the run from its start to its end."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    folder, job = submit(slurm, tmp_path)
    slurm.wait(job, "COMPLETED", "FAILED", seconds=300)
    assert slurm.state(job) == "COMPLETED", output(folder)
    return folder


def test_two_nodes_train_to_the_end(undisturbed, slurm):
    assert len(losses(undisturbed)) == STEPS
    assert list((undisturbed / "export").rglob("*.safetensors"))
    text = output(undisturbed)
    assert "start 1, on n[1-2]" in text and "done, newest checkpoint: step-000024" in text
    assert launch(slurm, "status", undisturbed).startswith(f"{undisturbed}: done")


def test_a_preempted_run_ends_with_the_losses_of_an_undisturbed_one(slurm, undisturbed, tmp_path):
    folder, job = submit(slurm, tmp_path)
    assert f"job {job} of {folder} is still in the queue" in launch(
        slurm, "slurm", f"resume={folder}", "processes=2", code=2
    )
    wait_for_step(slurm, folder, job, 7)
    slurm.run("scontrol", "requeue", job)
    starts_again(slurm, folder, job)
    slurm.wait(job, "COMPLETED", "FAILED", seconds=300)
    text = output(folder)
    assert "SIGTERM: saving a checkpoint and stopping" in text and "start 2, on n[1-2]" in text, text
    assert losses(folder) == losses(undisturbed)


def test_before_its_time_is_up_a_run_queues_itself_again(slurm, undisturbed, tmp_path):
    folder, job = submit(slurm, tmp_path)
    wait_for_step(slurm, folder, job, 7)
    slurm.run("scancel", "--signal=USR1", job)  # what --signal=USR1@600 does ten minutes before the end
    starts_again(slurm, folder, job)
    slurm.wait(job, "COMPLETED", "FAILED", seconds=300)
    text = output(folder)
    assert "requeue, newest checkpoint: step-" in text and "start 2" in text, text
    assert losses(folder) == losses(undisturbed)


def test_a_cancelled_run_goes_on_when_it_is_submitted_again(slurm, undisturbed, tmp_path, monkeypatch, capsys):
    folder, job = submit(slurm, tmp_path)
    wait_for_step(slurm, folder, job, 7)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    cancel.main([str(folder)])  # in this process: another takes longer to start than the run to end
    assert "saves a checkpoint and ends" in capsys.readouterr().out
    slurm.wait(job, "COMPLETED", "FAILED", seconds=60)
    assert launch(slurm, "status", folder).startswith(f"{folder}: stopped")
    launch(slurm, "slurm", f"resume={folder}", "nodes=2", "processes=2", "cpus=1")
    again = json.loads((folder / "launch.json").read_text(encoding="utf-8"))["job"]
    assert again != job
    wait_for_step(slurm, folder, again, 12)
    slurm.run("scancel", again)
    slurm.wait(again, "CANCELLED")
    launch(slurm, "slurm", f"resume={folder}", "cpus=1")  # nodes and processes are the run's
    last = json.loads((folder / "launch.json").read_text(encoding="utf-8"))["job"]
    slurm.wait(last, "COMPLETED", "FAILED", seconds=300)
    assert losses(folder) == losses(undisturbed), output(folder)


def test_a_killed_process_costs_nothing_but_the_time_since_the_last_checkpoint(slurm, undisturbed, tmp_path):
    folder, job = submit(slurm, tmp_path)
    wait_for_step(slurm, folder, job, 7)
    ranks = subprocess.run(
        ["pgrep", "-f", f"train resume={folder}"], capture_output=True, encoding="utf-8"
    ).stdout.split()
    mine = [pid for pid in ranks if "SLURM_PROCID=2" in Path(f"/proc/{pid}/environ").read_text(encoding="utf-8")]
    subprocess.run(["kill", "-9", mine[0]], check=True)
    starts_again(slurm, folder, job)
    slurm.wait(job, "COMPLETED", "FAILED", seconds=300)
    # whether the others find words for it depends on how soon SLURM ends them
    assert re.search("(running|died), newest checkpoint: step-000005", output(folder)), output(folder)
    assert losses(folder) == losses(undisturbed)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (["nodes=2", "processes=2", "partition=nix"], "invalid partition specified: nix"),
        (["nodes=9", "processes=2"], "would wait for ever: Partition"),
        (["nodes=2", "gpus=8"], "generic resource (gres) specification"),
        (["nodes=2", "processes=2", "sbatch=--nix=1"], "unrecognized option"),
        (["nodes=2", "processes=2", "partition=short", "time=30"], "would wait for ever: Partition"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words_and_ours(slurm, tmp_path, options, theirs):
    batch = {"data__batch_size": 1}
    said = launch(slurm, "slurm", *options, *words(tmp_path, **batch), code=2)
    assert theirs in said
    assert "This cluster's partitions: main (2 nodes, time infinite, no GPUs)" in said
    assert "submits it with other options" in said
    assert said.startswith("error: SLURM") and said.count("\n") == 1


def test_a_sweep_is_a_job_array_whose_runs_stand_alone(slurm, tmp_path, monkeypatch, capsys):
    """Each of four runs is a task; one is cancelled with a checkpoint, and the others stay as they are."""
    given = words(tmp_path, seed="0,1,2,3", trainer__steps=60, trainer__checkpoint_every=20)
    options = ["partition=main", "processes=1", "cpus=1", "at_once=2", "time=30"]
    launch(slurm, "slurm", "-m", *options, *given)
    for name in ("SLURM_CONF", "PATH"):  # status and cancel run in this process: another takes longer to start
        monkeypatch.setenv(name, slurm.environment[name])
    (path,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    runs = [path / str(number) for number in range(4)]
    jobs = [json.loads((run / "launch.json").read_text(encoding="utf-8"))["job"] for run in runs]
    array = jobs[0].removesuffix("_0")
    assert jobs == [f"{array}_{number}" for number in range(4)]
    status.main([str(path)])
    said = capsys.readouterr().out
    assert f"{path}: 0 of 4 runs done" in said and f"job {jobs[2]}: PENDING" in said
    for run, job in zip(runs[:2], jobs[:2], strict=True):
        wait_for_step(slurm, run, job, 7, seconds=400)
    cancel.main([str(runs[1])])
    assert f"job {jobs[1]} saves a checkpoint and ends" in capsys.readouterr().out
    slurm.wait(jobs[1], "COMPLETED", "FAILED", seconds=240)  # it stays so when SLURM starts it again, two minutes later
    assert slurm.state(jobs[1]) == "COMPLETED" and "stopped, newest checkpoint: step-" in output(runs[1])
    assert slurm.state(jobs[0]) in ("RUNNING", "COMPLETED") and "SIGINT" not in output(runs[0])
    slurm.run("scancel", array)
    for job in jobs:
        slurm.wait(job, "COMPLETED", "CANCELLED", "FAILED", seconds=90)
