"""``python -m launch slurm``: a run on a SLURM cluster, or a sweep as a job array."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.io.files import write_utf8
from launch.mounts import folders_of
from launch.plan import CPU_GIB, show_plan
from launch.prepare import RunOptions, layout, prepare
from launch.records import job_of, record, recorded
from launch.sbatch_script import Job
from launch.signal_time import seconds_before_end
from launch.slurm_jobs import bytes_of, queued, seconds_of, submit
from radial.cli.command import Command
from radial.cli.settings import at_least, setting
from train.config.compose import read_config, run_names
from train.config.schema import RunConfig
from train.errors import UserError
from train.planning import GIB, GPUS, Machine, this_machine
from train.preflight import preflight, remote_shards
from train.storage.run_folder import command
from train.storage.sweep_folder import SweepFolder, is_sweep
from train.sweep.command import prepare as prepare_sweep

SCRIPT = "job.sbatch"
_WORDS = ("partition", "account", "qos", "memory", "container")


@dataclass
class SlurmOptions(RunOptions):
    """A run or a sweep, and the job that it is."""

    multirun: bool = setting("-m or --multirun: a sweep, as a job array", False, short="m")
    gpu: str = setting("kind of the GPUs, for the plan", "h200", tuple(GPUS))
    processes: int | None = setting(
        "instead of gpus, on a cluster without GPUs: processes of each node", None, must=at_least(1)
    )
    partition: str | None = setting("partition, as sbatch has it", None)
    account: str | None = setting("account, as sbatch has it", None)
    qos: str | None = setting("quality of service, as sbatch has it", None)
    time: str | None = setting("limit of the job's time: minutes, H:MM:SS or D-HH:MM:SS", None)
    memory: str | None = setting("memory of each node, as sbatch has it", None)
    at_once: int | None = setting(
        "of a sweep: at most so many runs at a time; null: as many as there is room for", None, must=at_least(1)
    )
    cpus: int | None = setting("CPU cores of each process; null: its loader's workers and two", None, must=at_least(1))
    grace: int | None = setting(
        "before the end of the time, to finish a micro-batch and save; null: what the plan gives two micro-batches and "
        "300, at least 600, at most a quarter of time", None, unit="seconds", must=at_least(1),
    )  # fmt: skip
    container: str | None = setting(
        "a .sif image runs in Apptainer, any other through srun's --container-image (Pyxis)", None, path=True
    )
    mounts: str | None = setting(
        "folders that the container needs besides this one and those of the run's keys: A,B", None, path=True
    )
    modules: str = setting("modules that are loaded before the run: A,B", "")
    sbatch: str = setting("further options of sbatch, such as '--constraint=h200 --exclusive'", "")
    dry_run: bool = setting("make the folder and the script, and submit nothing", False)


@dataclass(frozen=True)
class Asked:
    """What is asked of SLURM, checked.

    Attributes:
        given: the command's settings.
        machine: that the plan is made for.
        words: the values of partition, account, qos, memory and container that are given.
        sbatch: further options of sbatch.
    """

    given: SlurmOptions
    nodes: int
    tasks: int  # processes a node
    gpus: int  # of each node
    machine: Machine
    words: dict[str, str]
    sbatch: list[str]

    @classmethod
    def of(cls, given: SlurmOptions, settings: dict[str, str]) -> Asked:
        """From the command's settings; takes the run's keys of the layout out of those of the run.

        Raises:
            UserError: a value that is none, or two that exclude each other.
        """
        if not given.dry_run and shutil.which("sbatch") is None:
            raise UserError("sbatch is not on this machine: run this on the cluster's login node, or add dry_run=true")
        if given.gpus is not None and given.processes is not None:
            raise UserError("gpus and processes are both set, expected one: processes is for clusters without GPUs")
        nodes, tasks, gpus = _layout(given, settings)
        memory = None if given.memory is None else bytes_of(given.memory)
        if gpus:
            machine = Machine(GPUS[given.gpu], gpus, nodes, memory or gpus * CPU_GIB * GIB)
        else:
            machine = this_machine(tasks, nodes)
        if given.time is not None:
            seconds_of(given.time)  # refuses what sbatch would not read
        words = {key: getattr(given, key) for key in _WORDS if getattr(given, key) is not None}
        more = _sbatch_words(given.sbatch)
        others = [("mounts", given.mounts or ""), ("modules", given.modules), *(("sbatch", word) for word in more)]
        for key, word in [*words.items(), *others]:
            if "\n" in word:
                raise UserError(f"{key} is {word!r}, expected no line break: a job's script cannot have one there")
        if given.mounts is not None and given.container is None:
            raise UserError(f"mounts is {given.mounts}, it needs container=IMAGE")
        if given.resume is None and "conf" not in settings:
            raise UserError(f"conf is not set, give conf=RUN, one of {', '.join(run_names())}, or resume=<run folder>")
        return cls(given, nodes, tasks, gpus, machine, words, more)

    @property
    def seconds(self) -> int | None:
        """The time limit; None where there is none, which is sbatch's 0 too."""
        return None if self.given.time is None else seconds_of(self.given.time) or None


def launch(options: SlurmOptions, settings: dict[str, str]) -> None:
    """Writes the script into the run's or the sweep's folder, and submits it."""
    asked = Asked.of(options, settings)
    if options.multirun:
        _launch_sweep(settings, asked)
    else:
        _launch_run(settings, asked)


def _launch_run(settings: dict[str, str], options: Asked) -> None:
    if options.given.at_once is not None:
        raise UserError(f"at_once is {options.given.at_once}, it needs -m: a single run has nothing beside it")
    folder, config = prepare(
        options.given, settings, options.nodes, options.tasks, elsewhere=True, offline=options.given.dry_run
    )
    budget = show_plan(folder.path, config, options.machine)
    path = folder.path.resolve()
    script = _write_script(path, [config], options, seconds_before_end(options.given.grace, options.seconds, budget))
    record(path, how="slurm", gpus=options.gpus)  # also of a job that is refused or submitted by hand
    if options.given.dry_run:
        _print_unseen([config])
        print(f"submit it  sbatch {shlex.quote(str(script))}")
        return
    job = submit(script, command("launch slurm resume=", folder.path))
    record(path, how="slurm", job=job, gpus=options.gpus)
    _print_next(job, folder.path, "logs", "follow=true")


def _launch_sweep(settings: dict[str, str], options: Asked) -> None:
    if options.given.resume is not None:
        settings["resume"] = str(options.given.resume)
    if settings.keys() - {"resume"}:
        settings |= {"trainer.nodes": str(options.nodes), "trainer.devices": str(options.tasks)}
    sweep = prepare_sweep(settings, lambda config: preflight(config, elsewhere=True, offline=options.given.dry_run))
    numbers: list[int] = []
    configs: list[RunConfig] = []
    graces: list[int] = []
    for number in sweep.unfinished():
        folder = sweep.run(number)
        job = job_of(folder)
        if queued(job):
            print(f"run {number:<4} {sweep.label(number)}: is left to job {job}, {queued(job)}")
            continue
        _, config = prepare(
            RunOptions(resume=folder), {}, options.nodes, options.tasks, elsewhere=True, offline=options.given.dry_run
        )
        budget = show_plan(folder, config, options.machine, quiet=bool(numbers))
        graces.append(seconds_before_end(options.given.grace, options.seconds, budget))
        numbers.append(number)
        configs.append(config)
        print(f"run {number:<4} {sweep.label(number)}")
    if not numbers:
        raise UserError(f"{sweep.path} has nothing left to submit: every run is done or in the queue")
    path = sweep.path.resolve()
    script = _write_script(path, configs, options, max(graces), _array(numbers, options.given.at_once))
    for number in numbers:
        record(sweep.run(number), how="slurm", gpus=options.gpus)
    if options.given.dry_run:
        _print_unseen(configs)
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


def _write_script(
    path: Path, configs: Sequence[RunConfig], options: Asked, grace: int, array: str | None = None
) -> Path:
    job = Job(
        name=configs[0].conf,
        folder=path,
        nodes=options.nodes,
        tasks=options.tasks,
        gpus=options.gpus,
        cpus=options.given.cpus or max(config.data.workers for config in configs) + 2,
        grace=grace,
        array=array,
        time=options.given.time,
        sbatch=options.sbatch,
        mounts=mounts(options.given.mounts, configs) if "container" in options.words else (),
        modules=options.given.modules.replace(",", " ").split(),
        **options.words,
    )
    script = path / SCRIPT
    write_utf8(script, job.script())
    print(f"script     {script}")
    return script


def _print_unseen(configs: Sequence[RunConfig]) -> None:
    for key, url in dict.fromkeys(item for config in configs for item in remote_shards(config).items()):
        print(f"not seen   {key} {url}: the job looks at it before it starts")


def _print_next(job: str, folder: Path, *follow: str) -> None:
    name, *options = follow
    print(f"job        {job}")
    print(" ".join([f"follow it  {command(f'launch {name} ', folder)}", *options]))
    print(f"           {command('launch status ', folder)}")
    print(f"stop it    {command('launch cancel ', folder)}")


def mounts(given: str | None, configs: Sequence[RunConfig]) -> list[str | Path]:
    """What the container sees beside the current folder: of the keys of all runs, and as it was asked for."""
    places = [folders_of(config) for config in configs]
    found = dict.fromkeys(path for paths, _ in places for path in paths)
    for key, text in dict.fromkeys(item for _, absent in places for item in absent.items()):
        print(f"warning: {key} is {text}, which is not on this machine: if it is on the nodes, add it to mounts=")
    return [*found, *(each for each in (given or "").split(",") if each)]


def _layout(given: SlurmOptions, settings: dict[str, str]) -> tuple[int, int, int]:
    """(nodes, processes a node, GPUs a node); of what goes on its own where they are not given."""
    key, nodes, tasks = "gpus" if given.processes is None else "processes", 1, None
    if given.resume is not None:
        folder = SweepFolder.read(given.resume).run(0) if is_sweep(given.resume) else given.resume
        before = read_config(folder).trainer
        nodes, tasks = before.nodes, before.devices
        if given.gpus is None and recorded(folder).get("gpus") == 0:
            key = "processes"
    nodes = layout(given.nodes, "nodes", settings) or nodes
    tasks = layout(getattr(given, key), key, settings) or tasks
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


main = Command(
    "python -m launch slurm",
    "Makes the run's folder with its plan and a readable job.sbatch, submits it, and prints how to follow it. Before "
    "its time is up, and when it is preempted, the run saves a checkpoint and queues itself again; after a node "
    "failure it goes on from the last checkpoint. Of a sweep (-m) each run is a task of the array and does so by "
    "itself; resume= names the sweep's folder then, and what is not finished of it is submitted.",
    SlurmOptions,
    launch,
    [
        "python -m launch slurm conf=wan_4x nodes=4 gpus=8 parallel.sequence=4 partition=h200 time=1-00:00:00 \\",
        "    model.path=... data.shards=...",
        "python -m launch slurm -m conf=wan_1.3b_2x nodes=1 gpus=8 lora.rank=32,128 seed=0,1,2 model.path=... \\",
        "    data.shards=...",
    ],
    others="those of the run, as for python -m train; conf=RUN is required for a new one",
)
