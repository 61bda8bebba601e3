"""``python -m launch slurm``: a run on a SLURM cluster."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from launch.mounts import folders_of
from launch.plan import CPU_GIB, show_plan
from launch.run_folders import layout, prepare, record, recorded
from launch.sbatch_script import Job
from train.cli import flag, whole_number
from train.config.compose import read_config, run_names, split_arguments
from train.config.schema import RunConfig
from train.errors import UserError
from train.planning import GIB, Budget, Duration, Machine, gpu_named, this_machine
from train.preflight import remote_shards

USAGE = """python -m launch slurm conf=RUN nodes=N gpus=N [partition=P] [time=D-HH:MM:SS] [option=value ...]
python -m launch slurm resume=<run folder> [option=value ...]      nodes and gpus are the run's if not given

Makes the run's folder with its plan and a readable job.sbatch, submits it, and says how to follow it. Before its time
is up, and when it is preempted, the run saves a checkpoint and queues itself again; after a node failure it goes on
from the last checkpoint.

  nodes=N, gpus=N    of each node; one process a GPU
  gpu=h200           their kind, for the plan
  processes=N        instead of gpus, on a cluster without GPUs: processes a node
  partition=, account=, qos=, time=, memory=    as sbatch has them; memory is a node's
  cpus=N             CPU cores a process; default: its loader workers and two
  grace=SECONDS      before the end of the time, to finish a micro-batch and save; default: what the plan gives two
                     micro-batches and 300, at least 600, at most a quarter of time
  container=IMAGE    a .sif image runs in Apptainer, any other through srun's --container-image (Pyxis)
  mounts=A,B         folders that the container needs besides this one and those of the run's keys
  modules=A,B        are loaded before the run: module load A B
  sbatch=WORDS       further options of sbatch, such as sbatch='--constraint=h200 --exclusive'
  dry_run=true       makes the folder and the script, and submits nothing
  key=value          of the run, as for python -m train

example:
  python -m launch slurm conf=wan_4x nodes=4 gpus=8 parallel.sequence=4 partition=h200 time=1-00:00:00 model.path=... \
      data.shards=...
"""
SCRIPT = "job.sbatch"
_LEAST_GRACE, _TO_SAVE = 600, 300  # seconds
_WAITS_FOR_EVER = ("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints", "InvalidQOS",
                   "InvalidAccount")  # fmt: skip


def _sbatch_words(text: str) -> list[str]:
    """The options in ``sbatch=``.

    Raises:
        UserError: a quote that is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"sbatch is {text!r}, expected options as a shell takes them: {error}") from error


def main(arguments: list[str]) -> None:
    """Writes the script into the run's folder and submits it."""
    settings = split_arguments(arguments)
    dry = flag("dry_run", settings.pop("dry_run", "false"))
    if not dry and shutil.which("sbatch") is None:
        raise UserError("sbatch is not on this machine: run this on the cluster's login node, or add dry_run=true")
    if "gpus" in settings and "processes" in settings:
        raise UserError("gpus and processes are both set, expected one: processes is for clusters without GPUs")
    nodes, tasks, gpus = _layout(settings)
    gpu = gpu_named(settings.pop("gpu", "h200"))
    time_limit = settings.pop("time", None)
    seconds = None if time_limit is None else seconds_of(time_limit)
    grace = whole_number("grace", settings.pop("grace")) if "grace" in settings else None
    cpus = whole_number("cpus", settings.pop("cpus")) if "cpus" in settings else None
    words = {key: settings.pop(key, None) for key in
             ("partition", "account", "qos", "memory", "container", "mounts", "modules")}  # fmt: skip
    more = _sbatch_words(settings.pop("sbatch", ""))
    for key, word in [*words.items(), *(("sbatch", word) for word in more)]:
        if word is not None and "\n" in word:
            raise UserError(f"{key} is {word!r}, expected no line break: a job's script cannot have one there")
    if words["mounts"] is not None and words["container"] is None:
        raise UserError(f"mounts is {words['mounts']}, it needs container=IMAGE")
    if not {"conf", "resume"} & settings.keys():
        raise UserError(f"conf is not set, give conf=RUN, one of {', '.join(run_names())}, or resume=<run folder>")
    folder, config = prepare(settings, nodes, tasks, elsewhere=True, offline=dry)
    machine = Machine(gpu, gpus, nodes, gpus * CPU_GIB * GIB) if gpus else this_machine(tasks, nodes)
    budget = show_plan(folder.path, config, machine)
    path = folder.path.resolve()
    asked, modules = words.pop("mounts"), words.pop("modules") or ""
    job = Job(
        config.conf,
        path,
        nodes,
        tasks,
        gpus,
        cpus or config.data.workers + 2,
        _grace(grace, seconds, budget),
        time=time_limit,
        sbatch=more,
        mounts=_mounts(asked, config) if words["container"] else (),
        modules=modules.replace(",", " ").split(),
        **words,
    )
    script = path / SCRIPT
    script.write_text(job.script(), encoding="utf-8")
    print(f"script     {script}")
    record(path, how="slurm", gpus=gpus)  # also of a job that is refused or submitted by hand
    if dry:
        for key, url in remote_shards(config).items():
            print(f"not asked  {key} {url}: the job looks at it before it starts")
        print(f"submit it  sbatch {shlex.quote(str(script))}")
        return
    number = submit(script)
    record(path, how="slurm", job=number, gpus=gpus)
    print(f"job        {number}")
    run = shlex.quote(str(folder.path))
    print(f"follow it  python -m launch logs {run} follow=true")
    print(f"           python -m launch status {run}")
    print(f"stop it    python -m launch cancel {run}")


def _grace(given: int | None, limit: int | None, budget: Budget | None) -> int:
    """Seconds from SLURM's signal to the end of the time; says so where the plan needs more."""
    slowest = (Duration(budget).slowest_micro_step if budget is not None else None) or 0.0
    needed = math.ceil(2 * slowest + _TO_SAVE)
    grace = max(_LEAST_GRACE, needed) if given is None else given
    if limit is not None:
        grace = min(grace, max(1, limit // 4))
    if grace < needed and slowest:
        print(
            f"warning: the signal comes {grace} s before the end of the time, and the plan gives a micro-batch "
            f"{slowest:,.0f} s: {needed} s are needed to end one and save; set a longer time=, or grace={needed}"
        )
    return grace


def _mounts(given: str | None, config: RunConfig) -> list[str | Path]:
    """What the container sees beside the current folder: of the run's keys, and as it was asked for."""
    found, absent = folders_of(config)
    for key, text in absent.items():
        print(f"warning: {key} is {text}, which is not on this machine: if it is on the nodes, add it to mounts=")
    return [*found, *(each for each in (given or "").split(",") if each)]


def _layout(settings: dict[str, str]) -> tuple[int, int, int]:
    """(nodes, processes a node, GPUs a node); of a run that goes on its own where they are not given."""
    key, nodes, tasks = "processes" if "processes" in settings else "gpus", 1, None
    if "resume" in settings:
        folder = Path(settings["resume"])
        before = read_config(folder).trainer
        nodes, tasks = before.nodes, before.devices
        if "gpus" not in settings and recorded(folder).get("gpus") == 0:
            key = "processes"
    nodes, tasks = layout(settings, "nodes") or nodes, layout(settings, key) or tasks
    if tasks is None:
        raise UserError("gpus is not set, give gpus=<GPUs of each node>")
    return nodes, tasks, tasks if key == "gpus" else 0


def submit(script: Path) -> str:
    """The number of the submitted job.

    Raises:
        UserError: SLURM refuses it, or lets it wait for what it will never get; with SLURM's own words.
    """
    done = subprocess.run(
        ["sbatch", "--parsable", str(script)], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split()).removeprefix("sbatch: error: ")
        raise UserError(f"SLURM refuses the job: {reason}. {_cluster()}. The script is {script}; {_again(script)}")
    number = done.stdout.strip().split(";")[0]
    why = _pending_reason(number)
    if why in _WAITS_FOR_EVER:
        subprocess.run(["scancel", number])
        raise UserError(
            f"SLURM took job {number}, but it would wait for ever: {why}. {_cluster()}. The job is cancelled; "
            f"{_again(script)}"
        )
    return number


def _again(script: Path) -> str:
    return f"python -m launch slurm resume={shlex.quote(str(script.parent))} submits it with other options"


def _pending_reason(number: str) -> str:
    out = subprocess.run(
        ["squeue", "-h", "-j", number, "-o", "%r"], capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    return out.strip()


def _cluster() -> str:
    """The partitions in words."""
    out = subprocess.run(
        ["sinfo", "-h", "-o", "%P|%D|%l|%G"], capture_output=True, encoding="utf-8", errors="replace"
    ).stdout
    parts = [line.strip().split("|") for line in out.splitlines()]
    said = [f"{name.rstrip('*')} ({nodes} nodes, time {limit}, {gres})" for name, nodes, limit, gres in parts]
    return f"This cluster's partitions: {', '.join(said)}".replace("(null)", "no GPUs")


def seconds_of(time: str) -> int:
    """A time limit as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        UserError: something else.
    """
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time):
        raise UserError(f"time is {time!r}, expected one such as 90 (minutes), 12:00:00 or 1-00:00:00")
    days, dash, rest = time.rpartition("-")
    numbers = [int(word) for word in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
