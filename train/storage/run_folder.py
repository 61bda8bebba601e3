"""The folder of a run: making it, holding it against a second run, and saying how the run in it stands.

config.yaml     the whole config; a resume reads it
state           first line: starting (by a job), running, requeue, stopped, done, failed or died; then why, in words;
                none in a new folder
.ended-<job>    how the run stood when that job of SLURM ended, done or stopped (launch/template.sbatch)
.time_up        in the run's last start came SIGUSR1, SLURM's signal before the end of the time
.lock           held by rank 0 while it runs: host, process and SLURM job
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from data.io.files import can_sync, write_utf8
from data.io.locks import Lock, has_locks, say_no_locks, take
from radial.cli.ranks import Rank, slurm_job
from train.config.schema import RunConfig, structured
from train.errors import UserError

CONFIG, PLAN, STATE, LOCK, LAUNCH = "config.yaml", "plan.json", "state", ".lock", "launch.json"
TIME_UP = ".time_up"
_SINCE = "%Y-%m-%d %H:%M:%S"
_SHARED = "RADIAL_RUN_FOLDER"  # how the processes that Lightning's launcher starts learn the folder
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """Where a run writes, and the checkpoint it goes on from."""

    path: Path
    checkpoint: Path | None = None

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """A new ``<runs>/<conf>/<time>`` with the run's config in it; the processes of one run share it.

        Raises:
            UserError: it cannot be made, or these processes have no way to agree on one.
        """
        if _SHARED in os.environ and "LOCAL_RANK" in os.environ:
            return cls(Path(os.environ[_SHARED]))
        store = _store_of_torchrun()
        if store is not None and Rank.here().index:
            return cls(Path(store.get(_SHARED).decode()))
        path = stamped_folder(config)
        try:
            write_config(config, path)
        except OSError as error:
            raise UserError(f"runs: {path} cannot be written ({error.strerror}): make room, or set runs=") from error
        if config.trainer.devices > 1:
            os.environ[_SHARED] = str(path)
        if store is not None:
            store.set(_SHARED, str(path))
        return cls(path)


def stamped_folder(config: RunConfig) -> Path:
    """Makes a new, empty ``<runs>/<conf>/<time>``.

    Raises:
        UserError: it cannot be made.
    """
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    path = Path(config.runs) / config.conf / stamp
    for attempt in range(1, 100):
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            path = path.with_name(f"{stamp}_{attempt}")
        except OSError as error:
            raise UserError(f"runs: cannot create {path} ({error.strerror}); set runs=<a writable folder>") from error
    return path


def _store_of_torchrun() -> Any:
    """Where torchrun's processes meet, a ``torch.distributed.Store``; None for a process that it has not started."""
    starter = Rank.here().started_by
    if starter == "srun" or (starter == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"):
        raise UserError(
            "several processes are started at once, each of which would make a run folder: make it first, with "
            "python -m launch slurm ... dry_run=true, and start them with resume=<run folder>"
        )
    if starter != "torchrun":
        return None
    import torch.distributed as dist  # takes a second, and few need it

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"radial-{start}", dist.TCPStore(address, port, is_master=False))


def command(words: str, folder: Path) -> str:
    """A command about a run as a shell takes it, such as ``python -m train resume=<folder>`` of ``train resume=``."""
    return f"python -m {words}{shlex.quote(str(folder))}"


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the config of a run, whole or not at all."""
    write_utf8(folder / CONFIG, OmegaConf.to_yaml(structured(config)))


def going_on(config: RunConfig, folder: Path) -> RunConfig:
    """The config of a run that goes on: with checkpoints it needs ``lora.init`` no more."""
    from train.storage.checkpoints import checkpoints_of  # which imports torch

    if config.lora is None or not checkpoints_of(folder / "checkpoints"):
        return config
    return replace(config, lora=replace(config.lora, init=None))


def set_state(folder: Path, word: str, why: str = "") -> None:
    """Says how the run stands, in its log too; a full or read-only disk is not this function's business."""
    log.info("the run is %s%s", word, f": {' '.join(why.split())}" if why else "")
    try:
        write_utf8(folder / STATE, f"{word}\n{why}\n" if why else f"{word}\n")
    except OSError:
        # over the old one there is room on a full disk too
        with contextlib.suppress(OSError), (folder / STATE).open("r+", encoding="utf-8") as file:
            file.write(f"{word}\n{why}\n" if why else f"{word}\n")
            file.truncate()


def get_state(folder: Path) -> tuple[str, str]:
    """The word and the reason of `set_state`; ``new`` where nothing has run yet."""
    try:
        word, _, why = (folder / STATE).read_text(encoding="utf-8").partition("\n")
    except OSError:
        return "new", ""
    return word, why.strip()


def holder(folder: Path) -> dict[str, Any] | None:
    """Who runs in the folder now. None when nobody does.

    Returns:
        ``host``, ``pid``, ``job`` (of SLURM, or None), ``since``, and ``certain``: false where the file system has no
        locks and the process is another machine's, so that only the folder's own state is known.
    """
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            lock = take(file, shared=True)
            if lock is Lock.OURS:
                return None
            about = dict(json.load(file))
            here = about["host"] == socket.gethostname()
            if lock is Lock.HELD or (here and _is_alive(about)):
                return {**about, "certain": True}
            return {**about, "certain": False} if not here and get_state(folder)[0] == "running" else None
    except (OSError, ValueError, KeyError):
        return None


def _is_alive(about: dict[str, Any]) -> bool:
    """Whether a process of this machine still is the one that wrote this."""
    try:
        began = psutil.Process(about["pid"]).create_time()
    except psutil.Error:
        return False
    return began <= time.mktime(time.strptime(about["since"], _SINCE)) + 1


def lacks(folder: Path) -> list[str]:
    """What the file system of a folder cannot do, and what follows for runs in it.

    Raises:
        OSError: the folder cannot be written.
    """
    found = []
    if not has_locks(folder):
        found.append("no file locks: a second run in a run's folder goes unnoticed")
    if not can_sync(folder):
        found.append("folders cannot be synced: a power cut may lose the last checkpoint")
    return found


def gpus_given(folder: Path) -> int:
    """GPUs of each node that SLURM, or launch, gave this job; 0 outside of a job and in one without."""
    if "SLURM_JOB_ID" not in os.environ:
        return 0
    words = os.environ.get("SLURM_GPUS_ON_NODE", "")
    file = folder / LAUNCH
    noted = json.loads(file.read_text(encoding="utf-8")).get("gpus", 0) if file.is_file() else 0
    return max(int(words) if words.isdigit() else 0, int(noted))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets it go even when the process is killed.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make it writable, or copy it elsewhere and resume the copy"
        ) from error
    with file:
        lock = take(file, seconds=1)  # who only asks who holds it lets it go within a moment
        other = None if lock is Lock.OURS else holder(folder)
        if lock is Lock.HELD or (other is not None and other["certain"] and other["pid"] != os.getpid()):
            other = other or {"pid": "?", "host": "?", "job": None, "since": "?"}
            job = f", SLURM job {other['job']}" if other["job"] else ""
            raise UserError(
                f"{folder} is in use by process {other['pid']} on {other['host']}{job} since {other['since']}: "
                f"wait for it, or end it with {command('launch cancel ', folder)}"
            )
        if lock is Lock.NONE:
            say_no_locks(folder, "a second run in it")
        file.truncate(0)
        since = time.strftime(_SINCE)
        try:
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "job": slurm_job(), "since": since}, file)
            file.flush()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): make room there, and resume") from error
        try:
            yield
        finally:
            if lock is Lock.NONE:  # then nothing else shows that this process has ended its work here
                with contextlib.suppress(OSError):
                    file.truncate(0)
