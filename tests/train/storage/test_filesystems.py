"""Runs on file systems that sync no folders or have no locks: they go on, and everybody can tell how they stand."""

import errno
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from data.io import files, locks
from launch import doctor, status
from tests.helpers.faults import equal_checkpoints, losses, run
from tests.helpers.filesystems import NO_LOCKS, no_locks, no_sync
from tests.helpers.tiny import run_config
from train.errors import UserError
from train.storage.checkpoints import checkpoints_of
from train.storage.run_folder import LOCK, RunFolder, held, holder, set_state

SCRIPT = Path(doctor.__file__).with_name("template.sbatch")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(files, "warned", set())
    monkeypatch.setattr(locks, "warned", set())


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(run_config(tmp_path)).path


def test_a_run_whose_folder_cannot_be_synced_or_locked_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    (tmp_path / "odd").mkdir()
    plain = run(run_config(tmp_path / "plain"))
    monkeypatch.setattr(os, "fsync", no_sync(errno.EINVAL))
    monkeypatch.setattr("fcntl.flock", no_locks(errno.ENOSYS))
    odd = run(run_config(tmp_path / "odd"))
    assert losses(odd) == losses(plain)
    saved = checkpoints_of(odd / "checkpoints")
    assert [path.name for path in saved] == [path.name for path in checkpoints_of(plain / "checkpoints")]
    assert equal_checkpoints(saved[-1], plain / "checkpoints" / saved[-1].name)
    assert list((odd / "export").iterdir())
    said = (odd / "log.txt").read_text(encoding="utf-8")
    assert "could not be written" not in said
    assert status.standing(odd)[0] == "done"


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_a_run_of_this_machine_is_known_by_its_process(folder, monkeypatch, number, caplog):
    monkeypatch.setattr("fcntl.flock", no_locks(number))
    with held(folder):
        set_state(folder, "running")
        assert status.standing(folder)[0] == "running"
        assert (
            caplog.messages.count(f"{folder}: its file system has no locks: a second run in it would go unnoticed") == 1
        )
        about = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        other = {**about, "pid": os.getppid()}
        (folder / LOCK).write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(UserError, match=f"in use by process {os.getppid()} on "), held(folder):
            pass
        # another process has this number now
        earlier = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - 10**8))
        (folder / LOCK).write_text(json.dumps({**other, "since": earlier}), encoding="utf-8")
        assert holder(folder) is None
        assert status.standing(folder)[0] == "killed"


def test_without_locks_a_run_of_another_machine_is_known_by_its_word(folder, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_locks(errno.ENOLCK))
    about = {"host": "node7", "pid": 77, "job": "12", "since": "2026-01-01 10:00:00"}
    (folder / LOCK).write_text(json.dumps(about), encoding="utf-8")
    assert status.standing(folder)[0] == "new"
    set_state(folder, "running")
    word, why = status.standing(folder)
    assert word == "running"
    assert why.startswith("process 77 on node7, SLURM job 12 since 2026-01-01 10:00:00, by its own record (there are")
    (folder / "metrics.csv").write_text("step\n", encoding="utf-8")
    assert status.standing(folder)[1].endswith(", its last figures are 0 minutes old")
    set_state(folder, "stopped")
    assert status.standing(folder)[0] == "stopped"
    with held(folder):  # it may have been killed: it can be resumed
        assert holder(folder)["host"] == socket.gethostname()


def test_doctor_tries_syncs_and_locks(folder, monkeypatch, capsys):
    def said():
        return [str(finding) for finding in doctor.file_system(folder)]

    assert said() == []
    monkeypatch.setattr(os, "fsync", no_sync(errno.ENOTSUP))
    monkeypatch.setattr("fcntl.flock", no_locks(errno.ENOTSUP))
    locks_line, sync_line = said()
    assert "no file locks: a second run in a run's folder goes unnoticed  ->  set runs=" in locks_line
    assert "folders cannot be synced: a power cut may lose the last checkpoint  ->  set runs=" in sync_line
    doctor.main([])
    assert "note     file system " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "expected", "said"), [(0, 0, ""), (1, 2, "another process runs in"), (71, 0, "no file locks in")]
)
def test_a_job_tells_a_held_folder_from_one_without_locks(tmp_path, code, expected, said):
    """The script's own lines about the lock, with a `flock` that ends so."""
    lines = SCRIPT.read_text(encoding="utf-8").split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("flock "))
    last = lines.index("esac", first)
    flock = tmp_path / "flock"
    flock.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
    flock.chmod(0o755)
    script = "\n".join([f"RUN={tmp_path}", *lines[first : last + 1]])
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == expected and said in done.stdout and bool(said) == bool(done.stdout)
