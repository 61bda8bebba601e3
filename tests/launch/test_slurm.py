"""``python -m launch slurm`` without a SLURM: scripts, limits, mistakes, dry runs; a real one is in tests/cluster."""

import os
import subprocess
from pathlib import Path

import pytest

from launch import doctor, status
from launch.mounts import folders_of
from launch.records import record
from launch.sbatch_script import Job
from launch.signal_time import seconds_before_end
from launch.slurm import main, mounts
from launch.slurm_jobs import bytes_of, seconds_of
from radial.errors import Mistake
from tests.helpers.tiny import words
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.planning import GIB, GPUS, Budget, Machine
from train.storage.run_folder import set_state


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


def test_the_plan_counts_the_memory_that_is_asked_for(tmp_path, capsys):
    main(["gpus=2", "memory=96G", "time=0", "dry_run=true", *words(tmp_path)])
    said = capsys.readouterr().out
    assert "2 x NVIDIA H200, 96 GiB of CPU memory a node" in said and "warning: the signal" not in said
    (folder,) = (tmp_path / "runs" / "shapes_4x").iterdir()
    assert "#SBATCH --signal=USR1@600" in (folder / "job.sbatch").read_text(encoding="utf-8")  # 0 is no limit
    assert [bytes_of(text) for text in ("2048", "2gb", "1T", "0")] == [2 * GIB, 2 * GIB, 1024 * GIB, None]


def job(**changes) -> Job:
    given = {"name": "wan_4x", "folder": Path("/runs/one"), "nodes": 2, "tasks": 8, "gpus": 8, "cpus": 6, "grace": 300}
    return Job(**{**given, **changes})


def test_the_script_says_what_was_asked_and_bash_can_read_it(tmp_path):
    script = job(
        account="lab",
        qos="high",
        partition="h200",
        time="1-00:00:00",
        sbatch=["--exclusive", "--nice=5", "--comment=a b", "--reservation", "my own", "-C", "h200"],
    ).script()
    for line in (
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=6", "--account=lab", "--qos=high",
        "--partition=h200", "--time=1-00:00:00", "--exclusive", "--nice=5", '--comment="a b"', '"my own"', "h200",
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
    assert mounts("/data", [config]) == [*found, "/data"]
    other = finish(compose_run({"conf": "wan_4x", "data.shards": str(away / "blobs"), "model.path": "weights"}))
    assert mounts(None, [other, config]) == [away / name for name in ("blobs", "weights", "runs")]  # of a sweep
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
    """40 dense layers of Wan 4x take 13.9 s each on an H200, forward and backward."""
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
        (["gpus=1", "memory=much"], "memory is 'much', expected a node's, such as 512G"),
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
