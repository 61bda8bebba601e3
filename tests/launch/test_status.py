"""How runs and sweeps stand, what they print and how they are cancelled: ``status``, ``logs``, ``cancel``."""

import json
import os
import pty
import time
from types import SimpleNamespace

import pytest

from launch import cancel, logs, status
from launch.logs import has_reader
from launch.records import job_of, record
from radial.errors import Mistake
from tests.helpers.tiny import run_config
from train.errors import UserError
from train.storage.run_folder import RunFolder, get_state, held, set_state


def test_status_logs_and_cancel_know_a_sweep(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, state in enumerate(("done", "running", "new")):
        set_state(sweep.run(number), state)
        record(sweep.run(number), how="slurm", job=f"7_{number}")
    (sweep.run(1) / "slurm-7_1.out").write_text("of run 1\n", encoding="utf-8")
    asked = """#!/bin/sh
case "$*" in *--steps*) echo 7_1.batch 7_1.1 ;; *7_2*) echo 'PENDING (Resources)' ;; *7_1*) echo RUNNING ;; esac
"""
    for name, text in (("squeue", asked), ("scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/cancelled\n')):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    capsys.readouterr()
    status.main([str(sweep.path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{sweep.path}: 1 of 3 runs done" and lines[1].startswith("  0    seed=0  done ")
    assert lines[2].endswith("; job 7_1: RUNNING") and lines[3].endswith("; job 7_2: PENDING (Resources)")
    status.main([])
    assert capsys.readouterr().out.count("no step of 4 yet") == 3
    logs.main([str(sweep.path)])
    said = capsys.readouterr().out
    assert f"==> {sweep.run(1)} (seed=1) <==\nof run 1\n" in said and said.count("no output yet") == 2
    with pytest.raises(UserError, match="is a sweep, expected one of its runs"):
        logs.main([str(sweep.path), "follow=true"])
    cancel.main([str(sweep.path)])
    assert (tmp_path / "cancelled").read_text(encoding="utf-8") == "--signal=INT 7_1.1\n7_2\n"
    assert f"python -m train -m resume={sweep.path} goes on" in capsys.readouterr().out


def test_a_task_of_an_array_is_named_by_both_numbers(folder, monkeypatch):
    for name, value in (("SLURM_JOB_ID", "9"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)
    with held(folder):
        assert status.standing(folder)[1].split(" since ")[0].endswith("SLURM job 7_3")


def test_a_folder_is_held_by_one(folder):
    with held(folder):
        said = rf"is in use by process {os.getpid()} on .* since .*: wait for it, or end"
        with pytest.raises(UserError, match=said), held(folder):
            pass
        assert status.standing(folder)[0] == "running"
    with held(folder):
        pass


def test_status_tells_a_killed_run_from_a_stopped_one(folder):
    assert status.standing(folder)[0] == "new"
    set_state(folder, "running")
    assert status.standing(folder) == (
        "killed",
        f"python -m train resume={folder} begins anew, as there is no checkpoint yet",
    )
    (folder / "checkpoints" / "step-000010").mkdir(parents=True)
    assert status.standing(folder) == ("killed", f"python -m train resume={folder} goes on from step-000010")
    set_state(folder, "stopped", "by hand")
    assert status.standing(folder) == ("stopped", "by hand")
    assert get_state(folder) == ("stopped", "by hand")


def test_status_logs_and_cancel_of_a_run_that_does_not_run(folder, capsys):
    status.main([str(folder)])
    assert "no step of 4 yet" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no output yet"):
        logs.main([str(folder)])
    (folder / "log.txt").write_text("".join(f"line {n}\n" for n in range(50)), encoding="utf-8")
    logs.main([str(folder), "lines=2"])
    assert capsys.readouterr().out == "line 48\nline 49\n"
    with pytest.raises(UserError, match="nothing runs there"):
        cancel.main([str(folder)])
    with pytest.raises(Mistake, match="run is given twice: a b"):
        status.main(["a", "b"])
    with pytest.raises(UserError, match=r"/nowhere has no config.yaml"):
        status.main(["/nowhere"])
    record(folder, how="slurm", job="7")
    assert json.loads((folder / "launch.json").read_text(encoding="utf-8"))["job"] == "7"


def test_a_run_folder_may_have_any_name(tmp_path, capsys):
    folder = RunFolder.create(run_config(tmp_path, runs=tmp_path / "lr=1e-4, often")).path
    status.main([str(folder)])
    assert "no step of 4 yet" in capsys.readouterr().out
    set_state(folder, "running")
    assert status.standing(folder)[1].startswith(f"python -m train resume='{folder}' begins")
    (folder / "log.txt").write_text("one\ntwo\n", encoding="utf-8")
    logs.main([str(folder), "lines=1"])
    assert capsys.readouterr().out == "two\n"
    with pytest.raises(Mistake, match="lnies is not a known key; did you mean lines"):
        logs.main([str(folder), "lnies=1"])


def test_a_job_that_was_submitted_by_hand_is_known_while_it_runs(folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(status, "slurm_state", lambda job: asked.append(job) or "RUNNING")
    record(folder, how="slurm", gpus=1)  # of dry_run=true
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (folder / "slurm-8.out").write_text("of job 8\n", encoding="utf-8")
    with held(folder):
        logs.main([str(folder)])
        status.main([str(folder)])
    assert "of job 8\n" in capsys.readouterr().out and asked == ["8"]


def test_logs_are_those_of_the_last_start(folder, monkeypatch, capsys):
    """After its job has ended the run was taken up by hand, in no job and then in another."""
    record(folder, how="slurm", job="7")
    for age, name in ((300, "slurm-7.out"), (200, "log.txt"), (100, "slurm-8.out")):
        (folder / name).write_text(f"of {name}\n", encoding="utf-8")
        os.utime(folder / name, (time.time() - age,) * 2)
        logs.main([str(folder)])
        assert capsys.readouterr().out == f"of {name}\n"
    with held(folder):
        logs.main([str(folder)])
        assert job_of(folder) is None and capsys.readouterr().out == "of log.txt\n"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with held(folder):
        logs.main([str(folder)])
        assert job_of(folder) == "7" and capsys.readouterr().out == "of slurm-7.out\n"


def test_cancelling_a_job_that_still_checks_its_nodes_ends_it(folder, monkeypatch, capsys):
    called = []

    def slurm(words, **_):
        if words[0] == "squeue":
            return SimpleNamespace(returncode=0, stdout=steps, stderr="")
        called.append(words)
        return SimpleNamespace(returncode=0)

    steps = "7.batch\n7.extern\n7.1\n"
    monkeypatch.setattr(cancel, "slurm_state", lambda job: "RUNNING")
    monkeypatch.setattr("launch.cancel.subprocess.run", slurm)
    record(folder, how="slurm", job="7")
    set_state(folder, "running")
    cancel.main([str(folder)])
    set_state(folder, "starting")
    cancel.main([str(folder)])
    assert called == [["scancel", "--signal=INT", "7.1"], ["scancel", "7"]]
    assert get_state(folder)[0] == "stopped" and "job 7 is cancelled" in capsys.readouterr().out
    set_state(folder, "running")
    steps = "7.batch\n"
    with pytest.raises(UserError, match="job 7 runs, but no step of it; it begins or ends just now: try again"):
        cancel.main([str(folder)])


def test_a_process_that_cannot_be_ended_is_told(folder, monkeypatch):
    def kill(pid, number):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("launch.cancel.os.kill", kill)
    with held(folder), pytest.raises(UserError, match=f"process {os.getpid()}: Operation not permitted"):
        cancel.main([str(folder)])


def test_following_a_log_ends_with_the_run_and_not_before(folder, monkeypatch, capsys):
    """A SLURM job that waits to go on is followed across its requeue; a run on this machine until its end."""
    monkeypatch.setattr(logs, "ASK_EVERY", 0.2)
    states = ["PENDING (Resources)", "RUNNING", "PENDING (BeginTime)", "RUNNING", ""]
    file = folder / "slurm-7.out"

    def slurm_state(job):
        state = states.pop(0)
        if state == "RUNNING" or not state:
            with file.open("a", encoding="utf-8") as out:
                out.write(f"a line, {len(states)} states left\n")
        return state

    monkeypatch.setattr(logs, "slurm_state", slurm_state)
    record(folder, how="slurm", job="7")
    logs.main([str(folder), "follow=true"])
    said = f"waiting for {file}: job 7 is PENDING (Resources)\n"
    assert capsys.readouterr().out == said + "".join(f"a line, {n} states left\n" for n in (3, 1, 0))
    record(folder, how="local")
    (folder / "log.txt").write_text("first\n", encoding="utf-8")
    set_state(folder, "done")
    logs.main([str(folder), "follow=true"])
    assert capsys.readouterr().out == "first\n"


@pytest.mark.parametrize("kind", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_following_a_log_ends_when_nobody_reads_it(folder, monkeypatch, kind):
    (folder / "log.txt").write_text("first\n", encoding="utf-8")
    set_state(folder, "running")
    reader, writer = kind()
    asked = []

    def of_the_writer():
        asked.append(has_reader(writer))
        if len(asked) == 1:
            os.close(reader)
        return asked[-1]

    monkeypatch.setattr(logs, "has_reader", of_the_writer)
    with held(folder):
        logs.main([str(folder), "follow=true"])
    os.close(writer)
    assert asked == [True, False]


def test_a_damaged_folder_does_not_hide_the_other_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parents[2])
    other = folder.with_name("other")
    other.mkdir()
    (other / "config.yaml").write_text("{", encoding="utf-8")
    status.main([])
    said = capsys.readouterr().out
    assert "no step of 4 yet" in said and "damaged    " in said and said.count("\n") == 2
