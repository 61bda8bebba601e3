"""``python -m launch doctor``: what this machine has, and what a run needs."""

from __future__ import annotations

import contextlib
import netrc
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from radial.cli.command import Command
from radial.cli.settings import setting
from radial.errors import Mistake
from train.config.compose import compose_run, finish, read_config
from train.config.global_batch import micro_batches
from train.config.schema import RunConfig
from train.errors import UserError
from train.loggers.environment import backends, driver, environment, gpus, nccl, read_speed
from train.planning import Budget, training_call, without_kernel
from train.preflight import preflight
from train.storage.run_folder import going_on, gpus_given, lacks

_FREE_GIB = 20  # below this a run that saves optimizer states may fill the disk


@dataclass(frozen=True)
class Finding:
    """One line: ``ok``, ``note`` (a run works without it) or ``missing``."""

    verdict: str
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<8} {self.what:<12} {self.found}" + (f"  ->  {self.remedy}" if self.remedy else "")


@dataclass
class Options:
    """What is looked at."""

    run: Path | None = setting("a run folder: whether this machine has what that run needs", None)
    quick: bool = setting("only what would stop the run, as the job scripts of launch slurm ask of every node", False)


def examine(options: Options, settings: dict[str, str]) -> int:
    """Prints the findings; returns 1 where something is missing."""
    quick, run = options.quick, options.run
    config = None
    if run is not None:
        config = going_on(read_config(run), run)
    elif settings:
        config = finish(compose_run(settings))
    if run is not None and settings:
        raise UserError(f"{min(settings)} is set beside run, expected one of the two")
    findings = [] if quick else [*machine(), *attention(config), slurm()]
    folder = run or Path(config.runs if config else ".")
    findings += [disk(folder), *file_system(folder)]
    if config is not None:
        findings += needs(config, quick, gpus_given(run) if run is not None else 0)
    for finding in findings:
        if not quick or finding.verdict == "missing":
            print(f"{socket.gethostname()}: {finding}" if quick else finding)
    return int(any(finding.verdict == "missing" for finding in findings))


def machine() -> Iterator[Finding]:
    """Versions, GPUs, driver, NCCL."""
    about = environment()
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    yield Finding("ok", "software", f"Python {about['python']}, {packages}")
    yield Finding("ok", "CPU", f"{about['cpus']} cores, {about['memory_gib']:.0f} GiB of memory")
    if gpus():
        yield Finding("ok", "GPUs", "; ".join(gpus()))
    elif driver():
        remedy = f"install torch built for this driver (torch is built for CUDA {about['cuda']})"
        yield Finding("note", "GPUs", f"driver {driver()}, but torch {about['packages']['torch']} sees none", remedy)
    else:
        remedy = "small models train on the CPU; for others use a machine with NVIDIA GPUs and their driver"
        yield Finding("note", "GPUs", "none, and no nvidia-smi", remedy)
    if gpus():
        yield Finding("ok", "driver", f"{driver()}, torch built for CUDA {about['cuda']}")
    if nccl():
        yield Finding("ok", "NCCL", nccl() or "")
    else:
        remedy = "with GPUs, install torch's CUDA build" if not gpus() else "several GPUs need a torch with NCCL"
        yield Finding("note", "NCCL", "not usable here, processes talk over gloo", remedy)


def attention(config: RunConfig | None) -> Iterator[Finding]:
    """The backends, and why not: of the run's call, or of one with a head dimension of 128 in blocks of 128."""
    wanted = config.attention.backend if config is not None else None
    budget = Budget.here(config) if config is not None else None
    call = None if budget is None else training_call(budget)
    for name, why in backends(call).items():
        if why is None:
            yield Finding("ok", "attention", name)
        else:
            verdict, remedy = "note", "the fastest usable one is taken"
            if name == wanted:
                verdict, remedy = "missing", "set attention.backend=null, or mend what it names"
            yield Finding(verdict, "attention", f"{name}: {why}", remedy)
    slow = None if budget is None or wanted is not None else without_kernel(budget)
    if slow is not None:
        yield Finding("note", "attention", slow, "make trainer.timeout longer than a forward and than a backward")


def slurm() -> Finding:
    """SLURM's commands and partitions."""
    if shutil.which("sbatch") is None:
        return Finding("note", "SLURM", "no sbatch", "use python -m launch local, or go to the cluster's login node")
    done = subprocess.run(
        ["sinfo", "-h", "-o", "%P %D nodes %G"], capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != 0:
        reason = " ".join(done.stderr.split())
        return Finding("note", "SLURM", f"sinfo: {reason}", "the controller does not answer: ask the cluster's staff")
    return Finding("ok", "SLURM", "; ".join(line.strip() for line in done.stdout.splitlines()))


def disk(folder: Path) -> Finding:
    """Whether the runs' folder, or the nearest that exists above it, can be written, and how much is free there."""
    there = _nearest(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding(
            "missing", "disk", f"{there}: {error.strerror}", "make it writable, or set runs=<another folder>"
        )
    free = shutil.disk_usage(there).free / 2**30
    if free < _FREE_GIB:
        return Finding(
            "note", "disk", f"{there}: {free:.1f} GiB free", "make room: a checkpoint of a 14B LoRA is 3 GiB"
        )
    return Finding("ok", "disk", f"{there}: {free:,.0f} GiB free")


def file_system(folder: Path) -> Iterator[Finding]:
    """What the file system of the runs' folder cannot do; none where it cannot be written."""
    there = _nearest(folder)
    with contextlib.suppress(OSError):  # the check of the disk reports it
        for lack in lacks(there):
            yield Finding("note", "file system", f"{there}: {lack}", "set runs=<a folder on another file system>")


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest that exists above it."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def needs(config: RunConfig, quick: bool, given: int = 0) -> Iterator[Finding]:
    """What the run needs.

    Args:
        given: GPUs that SLURM says this node has for the job.
    """
    if (gpus() or given) and len(gpus()) < config.trainer.devices:
        remedy = "set trainer.devices, or give the job more GPUs"
        if len(gpus()) < given:
            remedy = (
                f"the job has {given} a node: nvidia-smi there says why torch does not see them; leave the node out"
            )
        yield Finding("missing", "GPUs", f"{len(gpus())}, the run wants {config.trainer.devices} a node", remedy)
    try:
        preflight(config)
        yield Finding("ok", "run", "weights, shards and settings fit together")
    except Mistake as error:
        yield Finding("missing", "run", str(error))
    if config.log.wandb == "online" and not _wandb_key():
        yield Finding("missing", "W&B", "not logged in", "run wandb login, or set log.wandb=offline")
    for place in [] if quick else config.data.places:
        try:
            speed, size = read_speed(place)
            per_step = size * config.data.batch_size * micro_batches(config)
        except Mistake as error:
            yield Finding("missing", "data", str(error))
            continue
        yield Finding("ok", "data", f"{speed / 1e6:,.0f} MB/s; a rank's step reads {per_step / 1e6:,.1f} MB")


def _wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


main = Command(
    "python -m launch doctor",
    "What this machine has: GPUs, driver, NCCL, attention backends, disk, SLURM. With a run: whether it has what that "
    'needs, and how fast it reads the data. Each line that is not ok ends in what to do; one that begins "missing" '
    "makes the exit code 1.",
    Options,
    examine,
    ["python -m launch doctor", "python -m launch doctor conf=wan_4x model.path=weights/wan_14b"],
    others="those of a run that has not begun: conf=wan_4x data.shards=shards/openvid_4x",
)
