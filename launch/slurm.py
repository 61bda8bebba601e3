"""``python -m launch slurm``: a run on a SLURM cluster."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.plan import CPU_GIB, show_plan
from launch.start import layout, prepare, record, recorded
from train.cli import flag, whole_number
from train.compose import read_config, split_arguments
from train.errors import UserError
from train.planning import GIB, Machine, gpu_named, this_machine
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
  grace=SECONDS      before the end of the time, to finish a step and save; default 600, at most a quarter of time
  container=IMAGE    a .sif image runs in Apptainer, any other through srun's --container-image (Pyxis)
  mounts=A,B         folders that the container needs besides this one
  sbatch=WORDS       further options of sbatch, such as sbatch='--constraint=h200 --exclusive'
  dry_run=true       makes the folder and the script, and submits nothing
  key=value          of the run, as for python -m train

example:
  python -m launch slurm conf=wan_4x nodes=4 gpus=8 parallel.sequence=4 partition=h200 time=1-00:00:00 model.path=... \
      data.shards=...
"""
SCRIPT = "job.sbatch"
_MARK = "# ---- the run"  # the template from here on is the same for every run
_WAITS_FOR_EVER = ("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints", "InvalidQOS",
                   "InvalidAccount")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What the head of the script says."""

    name: str
    folder: Path
    nodes: int
    tasks: int  # processes a node
    gpus: int  # of each node, 0 on a cluster without
    cpus: int  # cores a process
    grace: int  # seconds
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    memory: str | None = None
    container: str | None = None
    mounts: str | None = None
    sbatch: Sequence[str] = ()

    def script(self) -> str:
        """The whole sbatch file."""
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.time,
            "signal": f"USR1@{self.grace}",
            "requeue": "",
            "open-mode": "append",
            "chdir": Path.cwd(),
            "output": self.folder / "slurm-%j.out",
        }
        why = {
            "ntasks-per-node": "one a GPU" if self.gpus else "one a process",
            "signal": "seconds before the time is up, every rank is told to checkpoint",
            "requeue": "a node that dies, or a preemption, puts the job back into the queue",
            "open-mode": "and its output goes on in the same file",
        }
        words = " ".join(shlex.join(sys.argv[2:]).splitlines())  # a line of its own would be run, and end the options
        head = ["#!/bin/bash", f"# Written by: python -m launch slurm {words}"]
        for key, value in options.items():
            if value is not None:
                word = f"--{key}={value}" if value != "" else f"--{key}"
                line = f"#SBATCH {_as_sbatch_reads(word)}"
                head.append(f"{line:<40}  # {why[key]}" if key in why else line)
        head += [f"#SBATCH {_as_sbatch_reads(word)}" for word in self.sbatch]
        prefix, srun = self._container()
        head += [
            f"RUN={shlex.quote(str(self.folder))}",
            f"PYTHON={shlex.quote('python' if self.container else sys.executable)}",
            f"CONTAINER=({shlex.join(prefix)})",
            f"SRUN=({shlex.join(srun)})",
        ]
        template = Path(__file__).with_name("template.sbatch").read_text(encoding="utf-8")
        return "\n".join(head) + "\n\n" + template[template.index(_MARK) :]

    def _container(self) -> tuple[list[str], list[str]]:
        """What stands before the command, and options of srun."""
        if self.container is None:
            return [], []
        mounts = [str(Path.cwd()), *(self.mounts or "").split(",")]
        bound = ",".join(f"{each}:{each}" for each in mounts if each)
        if self.container.endswith(".sif"):
            return ["apptainer", "exec", "--nv", "--bind", bound, "--pwd", str(Path.cwd()), self.container], []
        workdir = f"--container-workdir={Path.cwd()}"
        return [], [f"--container-image={self.container}", f"--container-mounts={bound}", workdir]


def _as_sbatch_reads(word: str) -> str:
    """An option with its value in quotes where it needs them: ``--comment=a b`` as ``--comment="a b"``."""
    name, equals, value = word.partition("=")
    if not re.search(r"""[\s#"'\\]""", value):
        return word
    escaped = re.sub(r'(["\\])', r"\\\1", value)
    return f'{name}{equals}"{escaped}"'


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
    grace = whole_number("grace", settings.pop("grace", "600"))
    if time_limit is not None:
        grace = min(grace, seconds_of(time_limit) // 4)
    cpus = whole_number("cpus", settings.pop("cpus")) if "cpus" in settings else None
    words = {key: settings.pop(key, None) for key in
             ("partition", "account", "qos", "memory", "container", "mounts")}  # fmt: skip
    more = _sbatch_words(settings.pop("sbatch", ""))
    for key, word in [*words.items(), *(("sbatch", word) for word in more)]:
        if word is not None and "\n" in word:
            raise UserError(f"{key} is {word!r}, expected no line break: a job's script cannot have one there")
    if words["mounts"] is not None and words["container"] is None:
        raise UserError(f"mounts is {words['mounts']}, it needs container=IMAGE")
    folder, config = prepare(settings, nodes, tasks, elsewhere=True, offline=dry)
    machine = Machine(gpu, gpus, nodes, gpus * CPU_GIB * GIB) if gpus else this_machine(tasks, nodes)
    show_plan(folder.path, config, machine)
    path = folder.path.resolve()
    job = Job(
        config.conf,
        path,
        nodes,
        tasks,
        gpus,
        cpus or config.data.workers + 2,
        grace,
        time=time_limit,
        sbatch=more,
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
