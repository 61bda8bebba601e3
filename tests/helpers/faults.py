"""Real faults for the tests of surviving: full and read-only disks, killed processes, samples that blow up."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from data.shards.manifest import Manifest
from data.shards.stream import read_samples
from data.shards.writer import ShardWriter
from train.callbacks import checkpoints as callbacks
from train.callbacks.throughput import Throughput
from train.errors import UserError
from train.parallel.control_group import ControlGroup
from train.run import train
from train.shards import training_shards
from train.storage.run_folder import RunFolder


@contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Callable[[str], None]]:
    """A file system of so many megabytes at ``folder``; gives a function that remounts it with other options."""
    folder.mkdir(exist_ok=True)
    size = f"size={int(megabytes * 1024)}k"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, encoding="utf-8"
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    """Leaves no byte free on the file system of ``folder``; the file that takes them."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass
    return filler


def losses(folder: Path) -> list[tuple[int, str]]:
    """(step, loss) of metrics.csv, to the last digit."""
    file = folder / "metrics.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("loss") and None not in row.values()]
    return [(int(row["step"]), row["loss"]) for row in rows]


class Run:
    """``python -m train``, or a script, in processes of its own, which form a group."""

    def __init__(self, *words: str, environment: dict[str, str] | None = None, script: Path | None = None) -> None:
        command = [sys.executable, *(["-m", "train"] if script is None else [str(script)]), *map(str, words)]
        given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            env=given,
            start_new_session=True,
        )

    def ranks(self) -> list[int]:
        """The processes by rank: the first, and those that it started to train with."""
        lines = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, encoding="utf-8"
        ).stdout.splitlines()
        children = [int(line.split()[0]) for line in lines if " train" in line or "train/__main__" in line]
        return [self.process.pid, *sorted(pid for pid in children if _is_rank(pid))]

    def wait_for(self, ready: Callable[[], bool], seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(self.end())
            time.sleep(0.02)

    def end(self, seconds: float = 400) -> str:
        """Waits for the end; the output. A run that does not end is killed, which is an error."""
        try:
            return self.process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.process.communicate()[0]}") from None

    def kill(self) -> None:
        """kill -9 of every process."""
        os.killpg(self.process.pid, signal.SIGKILL)


def _is_rank(pid: int) -> bool:
    try:
        return b"LOCAL_RANK=" in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends in this time; one that nobody has asked for its exit code has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def only_run(runs: Path) -> Path:
    """The one run folder."""
    (folder,) = (runs / "shapes_4x").iterdir()
    return folder


def equal_checkpoints(one: Path, other: Path) -> bool:
    """Weights, optimizer state and the rest of two checkpoints are the same, bit for bit."""
    from train.storage.checkpoints import load_state, load_weights

    def flat(item: object, name: str = "") -> dict[str, object]:
        if isinstance(item, dict):
            return {k: v for key, value in item.items() for k, v in flat(value, f"{name}.{key}").items()}
        if isinstance(item, list):
            return {k: v for i, value in enumerate(item) for k, v in flat(value, f"{name}.{i}").items()}
        return {name: item}

    a, b = ({**flat(load_weights(path)), **flat(load_state(path))} for path in (one, other))
    # Lightning counts how often a loop was entered and ended
    keys = [key for key in a if ".loops." not in key and key != ".epoch"]
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in keys
    )


def save_by_the_clock(folder: Path) -> tuple[list[int], str]:
    """On each of two ranks: the steps at which `StepCheckpoints` saves while rank 1's clock is far ahead, and what it
    says when they start from different steps."""
    control = ControlGroup()
    now = 0.0
    callbacks.time = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)  # type: ignore[assignment]
    saves = callbacks.StepCheckpoints(folder, 6, 10.0, 2, control, SimpleNamespace(row={}), Throughput())  # type: ignore[arg-type]
    saved: list[int] = []

    def save(trainer: SimpleNamespace) -> None:
        saved.append(trainer.global_step)
        saves.tried_at = now

    saves.save = save  # type: ignore[method-assign,assignment]
    trainer = SimpleNamespace(
        global_step=0, is_global_zero=False, global_rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    saves.on_train_start(trainer, SimpleNamespace(position=0))  # type: ignore[arg-type]
    for step in range(1, 7):
        for _ in range(2):  # micro-batches
            now += (2.5 if control.rank == 0 else 600.0) * 60
            trainer.global_step = step
            saves.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    try:
        trainer.global_step = control.rank
        saves.on_train_start(trainer, SimpleNamespace(position=control.rank))  # type: ignore[arg-type]
    except UserError as error:
        return saved, str(error)
    return saved, ""


def run(config, *callbacks: Callback) -> Path:
    """Trains in a new folder, which it returns."""
    folder = RunFolder.create(config)
    train(config, folder, extra_callbacks=callbacks)
    return folder.path


def at_step(step, what) -> Callback:
    """Calls ``what`` after a step."""

    class Fault(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                what()

    return Fault()


def poisoned(config, tmp_path, number):
    """The run's shards with one sample so large that its squared error is infinite."""
    source = training_shards(config)
    about = {name: getattr(source, name) for name in ("fps", "encoder", "latent", "text", "arguments")}
    with ShardWriter(tmp_path / "poisoned", **about, empty_prompt=source.load_empty_prompt()) as writer:
        for index, sample in enumerate(read_samples(source)):
            latent = sample.latent * (1e25 if index == number else 1)
            writer.write(replace(sample, latent=latent))
    return replace(config, data=replace(config.data, shards=str(tmp_path / "poisoned"), synthetic_clips=0))


def damage(shards, number):
    """Makes a sample of the first shard unreadable; its key."""
    shard = Manifest.load(shards).shards[0]
    info = shard.samples[number]
    with (shards / shard.file).open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\xff" * info.bytes)
    return info.key
