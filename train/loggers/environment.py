"""What a run runs on: for its records, and for ``python -m launch doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from data.shards.manifest import Manifest
from data.shards.reader import SampleReader
from radial import Released, VideoGrid, build_layout
from radial.backends import BACKENDS, AttentionCall
from train.errors import UserError
from train.planning import cpu_memory

PACKAGES = ("torch", "lightning", "diffusers", "peft", "deepspeed", "transformers", "wandb", "flash-attn-4")
_READ_SECONDS = 3.0


def environment() -> dict[str, Any]:
    """Host, versions, GPUs and the code's git revision, as JSON has them."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = str(torch.__version__)  # a package's metadata may lack the +cu130 by which builds differ
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": cpu_memory() / 2**30,  # of the container or the job
        "gpus": gpus(),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "nccl": nccl(),
        "git": git_revision(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "packages": versions,
    }


def gpus() -> list[str]:
    """The GPUs' names and memory."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace").stdout.split()
    return lines[0] if lines else None


def nccl() -> str | None:
    """NCCL's version; None where torch cannot use it."""
    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def git_revision() -> str | None:
    """The commit of this project's code, with ``+`` when files differ from it; None outside of a git checkout."""
    where = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(where), *words], capture_output=True, encoding="utf-8", errors="replace"
            )
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())) is None:
        return None  # installed into a folder of another checkout, such as a virtual environment in it
    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else "")


def backends(call: AttentionCall | None = None) -> dict[str, str | None]:
    """Attention backend -> None, or why it cannot serve a call; without one, that of training with a head dimension of
    128 in blocks of 128 here."""
    if call is None:
        cuda = torch.cuda.is_available()
        device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32
        call = AttentionCall(device, dtype, 128, True, False, build_layout(Released(), VideoGrid(8, 16, 16)))
    return {name: backend.why_not(call) for name, backend in BACKENDS.items()}


def read_speed(source: str) -> tuple[float, float]:
    """Reads samples of the shards for three seconds: bytes a second, and bytes of a sample.

    What the system has in its cache counts as read: of shards that were just written the figure is too good.

    Raises:
        DataError: a shard cannot be reached.
        UserError: there are no samples.
    """
    shards = Manifest.load(source)
    total, count, start = 0, 0, time.perf_counter()
    with SampleReader(shards) as reader:
        for number, shard in enumerate(shards.shards):
            for place in range(len(shard.samples)):
                total += len(reader.fetch(number, place))
                count += 1
                if time.perf_counter() - start > _READ_SECONDS:
                    break
            reader.release(number)
            if time.perf_counter() - start > _READ_SECONDS:
                break
    if not count:
        raise UserError(f"{source} has no samples, expected shards that python -m data.prepare has made")
    return total / (time.perf_counter() - start), total / count
