"""The commands of launch on this machine; a real SLURM is in tests/cluster."""

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cancel, doctor, local, logs, status
from launch.logs import has_reader
from launch.mounts import folders_of
from launch.records import record
from launch.sbatch_script import Job
from launch.signal_time import seconds_before_end
from launch.slurm import main, mounts
from launch.slurm_jobs import seconds_of
from radial.errors import Mistake
from tests.helpers.tiny import run_config, words
from train.config.compose import compose_run, finish, read_config
from train.errors import UserError
from train.loggers.environment import git_revision, read_speed
from train.planning import GIB, GPUS, Budget, Machine
from train.run import resume
from train.shards import training_shards
from train.storage.run_folder import RunFolder, get_state, held, set_state
from train.storage.sweep_folder import SweepFolder


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


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("2:30", 150), ("12:00:00", 43200), ("1-12", 129600), ("1-12:30", 131400), ("2-00:00:01", 172801)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("time", ["1h", "", "1:2:3:4", "1-"])
def test_another_time_limit_is_refused(time):
    with pytest.raises(UserError, match="time is .*, expected one such as"):
        seconds_of(time)


def job(**changes) -> Job:
    given = {"name": "wan_4x", "folder": Path("/runs/one"), "nodes": 2, "tasks": 8, "gpus": 8, "cpus": 6, "grace": 300}
    return Job(**{**given, **changes})


def test_the_script_says_what_was_asked_and_bash_can_read_it(tmp_path):
    script = job(
        account="lab",
        qos="high",
        partition="h200",
        time="1-00:00:00",
        sbatch=["--exclusive", "--nice=5", "--comment=a b"],
    ).script()
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--account=lab", "--qos=high",
        "--partition=h200", "--time=1-00:00:00", "--exclusive", "--nice=5", '--comment="a b"',
        "--signal=USR1@300", "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in script
    assert "#SBATCH --mem" not in script
    file = tmp_path / "job.sbatch"
    file.write_text(script, encoding="utf-8")
    assert subprocess.run(["bash", "-n", file]).returncode == 0


def test_folders_and_prompts_of_any_kind_end_no_line_of_the_script(tmp_path, monkeypatch):
    here = tmp_path / 'a "folder" with spaces #1'
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.argv", ["launch", "slurm", "validation.prompts=[a cat,\n$(touch it); a dog]"])
    script = job(folder=here / "run").script()
    written = str(here).replace('"', r"\"")
    assert f'#SBATCH --chdir="{written}"\n' in script
    assert f'#SBATCH --output="{written}/run/slurm-%j.out"\n' in script
    (here / "job.sbatch").write_text(script, encoding="utf-8")
    assert subprocess.run(["bash", "-n", "job.sbatch"], stderr=subprocess.PIPE).stderr == b""
    head = script.split("\nRUN=")[0].splitlines()
    assert all(line.startswith("#") for line in head) and head[1].endswith("[a cat, $(touch it); a dog]'")


def test_the_template_for_hand_use_is_readable_bash():
    file = Path(doctor.__file__).with_name("template.sbatch")
    assert subprocess.run(["bash", "-n", file]).returncode == 0


def test_containers_run_through_apptainer_or_pyxis():
    here = Path.cwd()
    apptainer = job(container="image.sif", mounts=["/data"]).script()
    assert f"CONTAINER=(apptainer exec --nv --bind {here}:{here},/data:/data --pwd {here} image.sif)" in apptainer
    assert "PYTHON=python\n" in apptainer
    pyxis = job(container="nvcr.io#nvidia/pytorch:25.01-py3").script()
    assert "SRUN=('--container-image=nvcr.io#nvidia/pytorch:25.01-py3' --container-mounts=" in pyxis


def test_a_container_sees_what_the_run_reads_and_writes(tmp_path, monkeypatch, capsys):
    here, away = tmp_path / "checkout", tmp_path / "away"
    for folder in (here, away / "weights", away / "blobs", away / "runs", here / "shards"):
        folder.mkdir(parents=True)
    (away / "blobs" / "1").write_text("a tensor", encoding="utf-8")
    (away / "weights" / "model.safetensors").symlink_to("../blobs/1")
    (here / "weights").symlink_to(away / "weights")
    monkeypatch.chdir(here)
    given = {"model.path": "weights", "data.shards": "shards", "data.cache": "/nowhere/cache", "runs": away / "runs"}
    config = finish(compose_run({"conf": "wan_4x", **{key: str(value) for key, value in given.items()}}))
    found, absent = folders_of(config)
    assert found == [away / name for name in ("blobs", "runs", "weights")]
    assert absent == {"data.cache": "/nowhere/cache"}
    assert mounts("/data", config) == [*found, "/data"]
    assert "data.cache is /nowhere/cache, which is not on this machine" in capsys.readouterr().out
    script = job(container="image.sif", mounts=found).script()
    assert f"--bind {here}:{here},{away}/blobs:{away}/blobs,{away}/runs:{away}/runs," in script


def test_modules_are_loaded_before_the_run_and_must_be_there(tmp_path):
    script = job(modules=["cuda/13.0", "gcc"]).script()
    file = tmp_path / "job.sbatch"
    file.write_text(script, encoding="utf-8")
    module = "module() { echo loads $@; [ $1 = load ]; }; export -f module; "
    found = subprocess.run(["bash", "-c", f"{module} bash {file}"], capture_output=True, encoding="utf-8")
    assert found.stdout == "loads load cuda/13.0 gcc\n" and "SLURM_JOB_ID: unbound" in found.stderr  # the line after
    none = subprocess.run(["bash", "-c", f"module() {{ false; }}; export -f module; bash {file}"], capture_output=True)
    assert (none.returncode, none.stdout) == (2, b"module load cuda/13.0 gcc failed\n")


def test_a_percent_sign_in_a_folder_is_no_pattern_of_slurm():
    script = job(folder=Path("/runs/50%j%%")).script()
    assert "#SBATCH --output=/runs/50%%j%%%%/slurm-%j.out\n" in script and "RUN=/runs/50%j%%\n" in script


@pytest.mark.parametrize(
    ("given", "limit", "seconds", "warned"),
    [
        (None, None, 2 * 550 + 300, False),  # the plan's, about
        (None, 86400, 2 * 550 + 300, False),
        (None, 3600, 900, True),
        (60, None, 60, True),
    ],
)
def test_the_signal_comes_as_early_as_the_plan_needs(capsys, given, limit, seconds, warned):
    """40 dense blocks of Wan 4x take 13.9 s each on an H200, forward and backward."""
    budget = Budget.of(finish(compose_run({"conf": "wan_4x"})), Machine(GPUS["h200"], 1, 1, 128 * GIB))
    assert seconds_before_end(given, limit, budget) == pytest.approx(seconds, rel=0.2 if seconds > 900 else 0)
    assert ("warning: the signal comes" in capsys.readouterr().out) == warned


def test_a_plan_without_times_asks_for_ten_minutes(capsys):
    assert (seconds_before_end(None, None, None), seconds_before_end(None, 600, None)) == (600, 150)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpus=0"], "gpus is 0, expected at least 1"),
        (["nodes=x", "gpus=1"], "nodes is 'x'"),
        ([], "gpus is not set, give gpus=<GPUs of each node>"),
        (["gpus=1", "processes=2"], "gpus and processes are both set"),
        (["gpus=1", "dry_run=1"], "dry_run is '1', expected true or false"),
        (["gpus=1", "mounts=/data"], "mounts is /data, it needs container=IMAGE"),
        (["gpus=1", "time=soon"], "time is 'soon'"),
        (["gpus=1", "sbatch=--comment='a"], "expected options as a shell takes them: No closing quotation"),
        (["gpus=1", "account=a\nb"], "account is 'a\\nb', expected no line break"),
        (["gpus=1", "trainer.devices=2"], "gpus is 1 and trainer.devices is 2, expected the same number"),
        (["nodes=1", "gpus=1", "trainer.nodes=2"], "nodes is 1 and trainer.nodes is 2, expected the same number"),
        (["gpus=1", "conf=shapes_4x", "partitoin=x"], "partitoin is not a known key"),
        (["gpus=1", "conf=shapes_4x", "at_once=2"], "at_once is 2, it needs -m"),
        (["gpus=1"], "conf is not set, give conf=RUN, one of "),
        (["gpus=1", "resume=/nowhere"], "/nowhere has no config.yaml"),
    ],
)
def test_a_mistake_is_named(arguments, said):
    with pytest.raises(Mistake) as error:
        main([*arguments, *([] if "dry_run=1" in arguments else ["dry_run=true"])])
    assert said in str(error.value)


def test_a_dry_run_leaves_a_folder_that_can_be_submitted(tmp_path, capsys):
    main(["nodes=2", "processes=2", "dry_run=true", "time=60", *words(tmp_path)])
    (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    assert f"submit it  sbatch {folder}/job.sbatch" in capsys.readouterr().out
    text = (folder / "job.sbatch").read_text(encoding="utf-8")
    assert f"RUN={folder}\n" in text and "--gpus-per-node" not in text
    assert "#SBATCH --signal=USR1@600" in text
    assert "nodes: 2\n  devices: 2\n" in (folder / "config.yaml").read_text(encoding="utf-8")
    main([f"resume={folder}", "partition=main", "dry_run=true"])  # as the error of a refused job says
    again = (folder / "job.sbatch").read_text(encoding="utf-8")
    for line in ("--nodes=2", "--ntasks-per-node=2", "--partition=main"):
        assert f"#SBATCH {line}" in again
    assert "--gpus-per-node" not in again
    status.main([str(folder)])
    assert "no step of 4 yet" in capsys.readouterr().out


def test_the_keys_that_a_plan_prints_are_taken_beside_gpus(tmp_path):
    main(["gpus=8", "trainer.devices=8", "trainer.nodes=2", "dry_run=true", *words(tmp_path, parallel__sequence=2)])
    (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    text = (folder / "job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --nodes=2" in text and "#SBATCH --gpus-per-node=8" in text
    main([f"resume={folder}", "dry_run=true"])
    assert "#SBATCH --gpus-per-node=8" in (folder / "job.sbatch").read_text(encoding="utf-8")


@pytest.fixture
def sweep(tmp_path, capsys):
    """A sweep of three runs, the first of which is done, with its script and not submitted."""
    main(["-m", "processes=1", "dry_run=true", "at_once=2", *words(tmp_path, seed="0,1,2")])
    (path,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    return SweepFolder.read(path)


def test_a_sweep_is_a_job_array_of_what_is_not_finished(sweep, capsys):
    text = (sweep.path / "job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-2%2" in text and f"RUN={sweep.path}/$SLURM_ARRAY_TASK_ID\n" in text
    assert f"#SBATCH --output={sweep.path}/%a/slurm-%A_%a.out\n" in text
    assert subprocess.run(["bash", "-n", sweep.path / "job.sbatch"]).returncode == 0
    set_state(sweep.run(1), "done")
    main(["-m", f"resume={sweep.path}", "partition=main", "dry_run=true"])
    said = capsys.readouterr().out
    assert "\nrun 0    seed=0\nrun 2    seed=2\n" in said and f"submit it  sbatch {sweep.path}/job.sbatch" in said
    again = (sweep.path / "job.sbatch").read_text(encoding="utf-8")
    for line in ("--array=0,2", "--partition=main", "--nodes=1", "--ntasks-per-node=1"):
        assert f"#SBATCH {line}" in again
    assert "--gpus-per-node" not in again and all((sweep.run(n) / "plan.json").exists() for n in range(3))
    for number in (0, 2):
        set_state(sweep.run(number), "done")
    with pytest.raises(UserError, match="has nothing left to submit: every run is done or in the queue"):
        main(["-m", f"resume={sweep.path}", "dry_run=true"])


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


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(run_config(tmp_path)).path


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


def test_a_run_of_several_nodes_goes_on_on_this_machine(tmp_path, monkeypatch, capsys):
    folder = RunFolder.create(run_config(tmp_path, trainer__nodes=2, trainer__devices=1)).path
    started = []
    monkeypatch.setattr("launch.local.os.execv", lambda program, words: started.append(words))
    local.main([f"resume={folder}", "nodes=1", "data.batch_size=2"])
    assert started and read_config(folder).trainer.nodes == 1


def test_following_a_log_ends_with_the_run_and_not_before(folder, monkeypatch, capsys):
    """A SLURM job that waits to go on is followed across its requeue; a run on this machine until its end."""
    monkeypatch.setattr(logs, "_ASK_EVERY", 0.2)
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


def test_a_job_that_waits_is_not_submitted_again(folder, tmp_path, monkeypatch):
    record(folder, how="slurm", job="7")
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'PENDING (Resources), starts N/A'\n", encoding="utf-8")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(
        UserError, match=r"job 7 of .* is still in the queue \(PENDING .*: wait for it, or end it first with"
    ):
        main([f"resume={folder}", "gpus=1", "trainer.keep=7", "dry_run=true"])
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


def test_a_damaged_folder_does_not_hide_the_other_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parents[2])
    other = folder.with_name("other")
    other.mkdir()
    (other / "config.yaml").write_text("{", encoding="utf-8")
    status.main([])
    said = capsys.readouterr().out
    assert "no step of 4 yet" in said and "damaged    " in said and said.count("\n") == 2


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
