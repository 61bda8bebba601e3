"""``python -m launch slurm``: a run on a SLURM cluster, or a sweep as a job array."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.mounts import folders_of
from launch.plan import CPU_GIB, show_plan
from launch.prepare import layout, prepare
from launch.records import job_of, record, recorded
from launch.sbatch_script import Job
from launch.signal_time import seconds_before_end
from launch.slurm_jobs import queued, seconds_of, submit
from train.cli import flag, whole_number
from train.config.compose import read_config, run_names, split_arguments
from train.config.schema import RunConfig
from train.errors import UserError
from train.planning import GIB, Machine, gpu_named, this_machine
from train.preflight import preflight, remote_shards
from train.storage.run_folder import command
from train.storage.sweep_folder import SweepFolder, is_sweep
from train.sweep.command import prepare as prepare_sweep

USAGE = """python -m launch slurm conf=RUN nodes=N gpus=N [partition=P] [time=D-HH:MM:SS] [option=value ...]
python -m launch slurm resume=<run folder> [option=value ...]      nodes and gpus are the run's if not given
python -m launch slurm -m conf=RUN nodes=N gpus=N key=value,value [option=value ...]      a sweep, as a job array
python -m launch slurm -m resume=<a sweep's folder> [option=value ...]      what is not finished of it

Makes the run's folder with its plan and a readable job.sbatch, submits it, and prints how to follow it. Before its time
is up, and when it is preempted, the run saves a checkpoint and queues itself again; after a node failure it goes on
from the last checkpoint. Of a sweep each run is a task of the array and does so by itself.

  nodes=N, gpus=N    of each node; one process a GPU
  gpu=h200           their kind, for the plan
  processes=N        instead of gpus, on a cluster without GPUs: processes a node
  partition=, account=, qos=, time=, memory=    as sbatch has them; memory is a node's
  at_once=N          of a sweep: at most so many runs at a time; default: as many as there is room for
  cpus=N             CPU cores a process; default: its loader workers and two
  grace=SECONDS      before the end of the time, to finish a micro-batch and save; default: what the plan gives two
                     micro-batches and 300, at least 600, at most a quarter of time
  container=IMAGE    a .sif image runs in Apptainer, any other through srun's --container-image (Pyxis)
  mounts=A,B         folders that the container needs besides this one and those of the run's keys
  modules=A,B        are loaded before the run: module load A B
  sbatch=WORDS       further options of sbatch, such as sbatch='--constraint=h200 --exclusive'
  dry_run=true       makes the folder and the script, and submits nothing
  key=value          of the run, as for python -m train

examples:
  python -m launch slurm conf=wan_4x nodes=4 gpus=8 parallel.sequence=4 partition=h200 time=1-00:00:00 model.path=... \\
      data.shards=...
  python -m launch slurm -m conf=wan_1.3b_2x nodes=1 gpus=8 lora.rank=32,128 seed=0,1,2 model.path=... data.shards=...
"""
SCRIPT = "job.sbatch"
_WORDS = ("partition", "account", "qos", "memory", "container", "mounts", "modules")


@dataclass(frozen=True)
class Options:
    """What the command line asks of SLURM; the rest of it is the run's.

    Attributes:
        machine: that the plan is made for.
        words: the values of partition, account, qos, memory, container, mounts and modules that are given.
        sbatch: further options of sbatch.
    """

    dry: bool
    nodes: int
    tasks: int  # processes a node
    gpus: int  # of each node
    machine: Machine
    time: str | None
    grace: int | None
    cpus: int | None
    at_once: int | None
    words: dict[str, str]
    sbatch: list[str]

    @classmethod
    def taken_from(cls, settings: dict[str, str]) -> Options:
        """Takes the options out of the settings.

        Raises:
            UserError: a value that is none, or two that exclude each other.
        """
        dry = flag("dry_run", settings.pop("dry_run", "false"))
        if not dry and shutil.which("sbatch") is None:
            raise UserError("sbatch is not on this machine: run this on the cluster's login node, or add dry_run=true")
        if "gpus" in settings and "processes" in settings:
            raise UserError("gpus and processes are both set, expected one: processes is for clusters without GPUs")
        nodes, tasks, gpus = _layout(settings)
        gpu = gpu_named(settings.pop("gpu", "h200"))
        machine = Machine(gpu, gpus, nodes, gpus * CPU_GIB * GIB) if gpus else this_machine(tasks, nodes)
        time = settings.pop("time", None)
        if time is not None:
            seconds_of(time)  # refuses what sbatch would not read
        numbers = {key: whole_number(key, settings.pop(key)) if key in settings else None
                   for key in ("grace", "cpus", "at_once")}  # fmt: skip
        words = {key: settings.pop(key) for key in _WORDS if key in settings}
        more = _sbatch_words(settings.pop("sbatch", ""))
        for key, word in [*words.items(), *(("sbatch", word) for word in more)]:
            if "\n" in word:
                raise UserError(f"{key} is {word!r}, expected no line break: a job's script cannot have one there")
        if "mounts" in words and "container" not in words:
            raise UserError(f"mounts is {words['mounts']}, it needs container=IMAGE")
        if not {"conf", "resume"} & settings.keys():
            raise UserError(f"conf is not set, give conf=RUN, one of {', '.join(run_names())}, or resume=<run folder>")
        return cls(dry, nodes, tasks, gpus, machine, time, words=words, sbatch=more, **numbers)

    @property
    def seconds(self) -> int | None:
        """The time limit."""
        return None if self.time is None else seconds_of(self.time)


def main(arguments: list[str]) -> None:
    """Writes the script into the run's or the sweep's folder, and submits it."""
    words = [word for word in arguments if word not in ("-m", "--multirun")]
    settings = split_arguments(words)
    options = Options.taken_from(settings)
    if len(words) < len(arguments):
        _launch_sweep(settings, options)
    else:
        _launch_run(settings, options)


def _launch_run(settings: dict[str, str], options: Options) -> None:
    if options.at_once is not None:
        raise UserError(f"at_once is {options.at_once}, it needs -m: a single run has nothing beside it")
    folder, config = prepare(settings, options.nodes, options.tasks, elsewhere=True, offline=options.dry)
    budget = show_plan(folder.path, config, options.machine)
    path = folder.path.resolve()
    script = _write_script(path, config, options, seconds_before_end(options.grace, options.seconds, budget))
    record(path, how="slurm", gpus=options.gpus)  # also of a job that is refused or submitted by hand
    if options.dry:
        _print_unseen(config)
        print(f"submit it  sbatch {shlex.quote(str(script))}")
        return
    job = submit(script, command("launch slurm resume=", folder.path))
    record(path, how="slurm", job=job, gpus=options.gpus)
    _print_next(job, folder.path, "logs", "follow=true")


def _launch_sweep(settings: dict[str, str], options: Options) -> None:
    if settings.keys() - {"resume"}:
        settings |= {"trainer.nodes": str(options.nodes), "trainer.devices": str(options.tasks)}
    sweep = prepare_sweep(settings, lambda config: preflight(config, elsewhere=True, offline=options.dry))
    numbers: list[int] = []
    graces: list[int] = []
    for number in sweep.unfinished():
        folder = sweep.run(number)
        job = job_of(folder)
        if queued(job):
            print(f"run {number:<4} {sweep.label(number)}: is left to job {job}, {queued(job)}")
            continue
        resumed = {"resume": str(folder)}
        _, config = prepare(resumed, options.nodes, options.tasks, elsewhere=True, offline=options.dry)
        budget = show_plan(folder, config, options.machine, quiet=bool(numbers))
        graces.append(seconds_before_end(options.grace, options.seconds, budget))
        numbers.append(number)
        print(f"run {number:<4} {sweep.label(number)}")
    if not numbers:
        raise UserError(f"{sweep.path} has nothing left to submit: every run is done or in the queue")
    path = sweep.path.resolve()
    script = _write_script(path, config, options, max(graces), _array(numbers, options.at_once))
    for number in numbers:
        record(sweep.run(number), how="slurm", gpus=options.gpus)
    if options.dry:
        _print_unseen(config)
        print(f"submit it  sbatch {shlex.quote(str(script))}")
        return
    job = submit(script, command("launch slurm -m resume=", sweep.path))
    for number in numbers:
        record(sweep.run(number), how="slurm", job=f"{job}_{number}", gpus=options.gpus)
    _print_next(job, sweep.path, "logs")
    print(f"compare it {command('train.report runs=', sweep.path)}")


def _array(numbers: Sequence[int], at_once: int | None) -> str:
    """sbatch's ``--array``: the numbers of the runs, and how many at a time."""
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    text = f"{numbers[0]}-{numbers[-1]}" if whole else ",".join(map(str, numbers))
    return text if at_once is None else f"{text}%{at_once}"


def _write_script(path: Path, config: RunConfig, options: Options, grace: int, array: str | None = None) -> Path:
    words = dict(options.words)
    asked, modules = words.pop("mounts", None), words.pop("modules", "")
    job = Job(
        name=config.conf,
        folder=path,
        nodes=options.nodes,
        tasks=options.tasks,
        gpus=options.gpus,
        cpus=options.cpus or config.data.workers + 2,
        grace=grace,
        array=array,
        time=options.time,
        sbatch=options.sbatch,
        mounts=mounts(asked, config) if "container" in words else (),
        modules=modules.replace(",", " ").split(),
        **words,
    )
    script = path / SCRIPT
    script.write_text(job.script(), encoding="utf-8")
    print(f"script     {script}")
    return script


def _print_unseen(config: RunConfig) -> None:
    for key, url in remote_shards(config).items():
        print(f"not seen   {key} {url}: the job looks at it before it starts")


def _print_next(job: str, folder: Path, *follow: str) -> None:
    name, *options = follow
    print(f"job        {job}")
    print(" ".join([f"follow it  {command(f'launch {name} ', folder)}", *options]))
    print(f"           {command('launch status ', folder)}")
    print(f"stop it    {command('launch cancel ', folder)}")


def mounts(given: str | None, config: RunConfig) -> list[str | Path]:
    """What the container sees beside the current folder: of the run's keys, and as it was asked for."""
    found, absent = folders_of(config)
    for key, text in absent.items():
        print(f"warning: {key} is {text}, which is not on this machine: if it is on the nodes, add it to mounts=")
    return [*found, *(each for each in (given or "").split(",") if each)]


def _layout(settings: dict[str, str]) -> tuple[int, int, int]:
    """(nodes, processes a node, GPUs a node); of what goes on its own where they are not given."""
    key, nodes, tasks = "processes" if "processes" in settings else "gpus", 1, None
    if "resume" in settings:
        folder = Path(settings["resume"])
        folder = SweepFolder.read(folder).run(0) if is_sweep(folder) else folder
        before = read_config(folder).trainer
        nodes, tasks = before.nodes, before.devices
        if "gpus" not in settings and recorded(folder).get("gpus") == 0:
            key = "processes"
    nodes, tasks = layout(settings, "nodes") or nodes, layout(settings, key) or tasks
    if tasks is None:
        raise UserError("gpus is not set, give gpus=<GPUs of each node>")
    return nodes, tasks, tasks if key == "gpus" else 0


def _sbatch_words(text: str) -> list[str]:
    """The options in ``sbatch=``.

    Raises:
        UserError: a quote that is not closed.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"sbatch is {text!r}, expected options as a shell takes them: {error}") from error
