"""Runs on this machine, and what ``doctor`` and the runs themselves find here."""

import functools
import json
import signal
import subprocess
import sys
import time

import pytest

from launch import doctor, local, status
from launch.records import record
from tests.helpers.tiny import run_config, words
from train.config.compose import read_config
from train.errors import UserError
from train.loggers.environment import git_revision, read_speed
from train.run import resume
from train.shards import training_shards
from train.storage.run_folder import RunFolder, get_state


def launch(*arguments, **options):
    words = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, encoding="utf-8", **options)


def test_help_names_every_command():
    said = launch("--help").stdout
    for name in ("local", "slurm", "status", "logs", "cancel", "doctor"):
        assert f"\n  {name} " in said
    wrong = launch("nix")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: 'nix' is not a command of python -m launch, expected one of ")


def test_a_run_of_several_nodes_goes_on_on_this_machine(tmp_path, monkeypatch, capsys):
    folder = RunFolder.create(run_config(tmp_path, trainer__nodes=2, trainer__devices=1)).path
    started = []
    monkeypatch.setattr("launch.local.os.execv", lambda program, words: started.append(words))
    local.main([f"resume={folder}", "nodes=1", "data.batch_size=2"])
    assert started and read_config(folder).trainer.nodes == 1


def test_a_job_whose_gpus_are_not_seen_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gpus", list)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    record(folder, how="slurm", job="7", gpus=1)
    doctor.main([f"run={folder}", "quick=true"])  # on the login node
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert doctor.main([f"run={folder}", "quick=true"]) == 1
    assert (
        "missing  GPUs         0, the run wants 1 a node  ->  the job has 1 a node: nvidia-smi"
        in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="SLURM gave this job 1 GPUs a node, but torch sees none on"):
        resume(folder, read_config(folder))
    assert get_state(folder)[0] == "failed"


def test_a_copy_in_another_projects_checkout_has_no_revision(tmp_path, monkeypatch):
    """A virtual environment lies in many a repository, which does not track it."""
    commit = git_revision()
    assert commit is None or len(commit.removesuffix("+")) == 40
    run = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True)
    run(["git", "init"])
    copy = tmp_path / "loggers" / "environment.py"
    copy.parent.mkdir()
    copy.write_text("", encoding="utf-8")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    run(["git", *identity, "commit", "--allow-empty", "-m", "theirs"])
    monkeypatch.setattr("train.loggers.environment.__file__", str(copy))
    assert git_revision() is None
    run(["git", "add", "loggers"])
    assert len(git_revision()) == 41  # as of a checkout with changes
    run(["git", *identity, "commit", "-m", "ours"])
    assert len(git_revision()) == 40


def test_doctor_says_what_is_here_and_what_a_run_lacks(tmp_path, capsys):
    doctor.main([])
    said = capsys.readouterr().out
    for what in ("software", "CPU", "GPUs", "NCCL", "attention", "SLURM", "disk"):
        assert f" {what} " in said
    notes = [line for line in said.splitlines() if not line.startswith("ok")]
    assert all("  ->  " in line for line in notes)
    assert doctor.main(["conf=wan_4x"]) == 1
    assert "missing  run          model.path is not set" in capsys.readouterr().out
    assert doctor.main([*words(tmp_path, data__synthetic_clips=0, data__shards=tmp_path / "nowhere")]) == 1
    said = capsys.readouterr().out
    assert (
        " software " in said
        and "missing  run          " in said
        and f"missing  data         {tmp_path}/nowhere" in said
    )
    doctor.main(words(tmp_path))
    assert "ok       run          weights, shards and settings fit together" in capsys.readouterr().out


def test_shards_without_a_sample_have_no_speed(tmp_path):
    shards = training_shards(run_config(tmp_path)).folder
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    (shards / "manifest.json").write_text(json.dumps({**manifest, "shards": [], "samples": 0}), encoding="utf-8")
    with pytest.raises(UserError, match="has no samples, expected shards that python -m data.prepare has made"):
        read_speed(str(shards))


@pytest.mark.slow
def test_a_local_run_is_stopped_by_cancel_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "launch", "local", *words(tmp_path, trainer__steps=300)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    try:
        end = time.monotonic() + 90
        while not list(tmp_path.glob("runs/shapes_4x/*/checkpoints/step-*")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
        assert "running: process" in launch("status", folder).stdout
        assert "saves a checkpoint and ends" in launch("cancel", folder).stdout
        assert process.wait(60) == 130
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.stdout is not None and " goes on from step-" in process.stdout.read()
    assert status.standing(folder)[0] == "stopped"
    last = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    resumed = [sys.executable, "-m", "train", f"resume={folder}", f"trainer.steps={last + 2}", "override=true"]
    done = subprocess.run(resumed, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert f"trainer.steps was 300, now {last + 2}" in done.stdout
    assert status.standing(folder)[0] == "done"
