"""GPUs and machines, as a plan needs to know them: from the makers' data sheets, or from the machine at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from train.planning.flops import peak_rate


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, or the CPU of a run without one.

    Attributes:
        name: as torch gives it, or the beginning of that.
        memory: bytes that torch sees.
        flops: dense bf16 FLOP/s of the data sheet; None where it is not known, and with it all times.
        bandwidth: bytes a second of its memory.
        link: bytes a second, each way, to another GPU of its node.
        capability: its compute capability, from which attention's backend follows (`train.planning.kernels`).
        here: whether it is this machine's: the libraries that are installed decide too.
        bf16: whether it multiplies bfloat16 natively, as a V100, a T4 and most CPUs do not.
    """

    name: str
    memory: float
    flops: float | None = None
    bandwidth: float = 0.0
    link: float = 0.0
    capability: tuple[int, int] = (8, 0)
    here: bool = False
    bf16: bool = True

    @property
    def float8(self) -> bool:
        """Whether it multiplies float8."""
        return self.capability >= (8, 9)


def _gpu(name: str, gib: float, bandwidth: float, link: float, capability: tuple[int, int]) -> Gpu:
    return Gpu(name, gib * 2**30, peak_rate(name), bandwidth, link, capability)


GPUS = {
    "h200": _gpu("NVIDIA H200", 139.8, 4.8e12, 4.5e11, (9, 0)),
    "h100": _gpu("NVIDIA H100", 79.1, 3.35e12, 4.5e11, (9, 0)),
    "a100": _gpu("NVIDIA A100", 79.1, 2.04e12, 3e11, (8, 0)),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", 31.4, 1.79e12, 5e10, (12, 0)),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 23.6, 1.01e12, 2.5e10, (8, 9)),
}
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, and the list of those that a process is in."""
BETWEEN_NODES = 5e10
"""Bytes a second, each way, that a GPU has to another node: one 400 Gb/s port a GPU, as DGX nodes have."""


@dataclass(frozen=True)
class Machine:
    """What a run is started on: ``nodes`` equal nodes of ``gpus`` GPUs and ``cpu_memory`` bytes each."""

    gpu: Gpu
    gpus: int
    nodes: int
    cpu_memory: float

    @property
    def world(self) -> int:
        """Processes, one a GPU."""
        return self.gpus * self.nodes

    @property
    def is_cpu(self) -> bool:
        """Whether it trains without a GPU: weights and activations then lie in CPU memory, of one for all ranks."""
        return self.gpu.name == "cpu"

    def precision(self, name: str) -> str:
        """``bf16`` or ``fp32`` of ``trainer.precision``; ``auto`` is bf16 where the hardware multiplies it natively."""
        if name != "auto":
            return name
        return "bf16" if self.gpu.bf16 else "fp32"


def this_machine(devices: int, nodes: int = 1) -> Machine:
    """The machine that this process runs on, with ``devices`` of its GPUs; without CUDA its CPU."""
    memory = cpu_memory()
    if not torch.cuda.is_available():
        cpu = Gpu("cpu", memory / devices, bf16=torch.cpu._is_amx_tile_supported())
        return Machine(cpu, devices, nodes, memory)
    found = torch.cuda.get_device_properties(0)
    known = next((gpu for gpu in GPUS.values() if found.name.startswith(gpu.name)), None)
    known = known or Gpu(found.name, 0.0, None)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    # a process that uses the GPU already may have limited itself, as a benchmark that stands for a smaller card
    share = torch.cuda.get_per_process_memory_fraction(0) if torch.cuda.is_initialized() else 1.0
    gpu = replace(known, name=found.name, memory=found.total_memory * share, bf16=bf16, here=True)
    return Machine(replace(gpu, capability=torch.cuda.get_device_capability(0)), devices, nodes, memory)


def resolve_precision(name: str) -> str:
    """`Machine.precision` of this machine."""
    return this_machine(1).precision(name)


def group_limits() -> Iterator[float]:
    """Bytes that the process's control group, and each that it lies in, may use: a job's limit is in one between."""
    for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = Path(path.lstrip("/"))  # may not be there, as a container sees its own group as the root
        for group in (own, *own.parents):
            file = root / group / name
            if file.is_file() and (text := file.read_text(encoding="utf-8").strip()).isdigit():  # else it is "max"
                yield float(text)


def cpu_memory() -> float:
    """Bytes of CPU memory that this process may use: the machine's, or its control groups' where that is less."""
    limits = [float(psutil.virtual_memory().total), *group_limits()]
    if os.environ.get("SLURM_MEM_PER_NODE", "").isdigit():
        limits.append(int(os.environ["SLURM_MEM_PER_NODE"]) * 2.0**20)
    return min(limits)
