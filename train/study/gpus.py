"""Processes that see one GPU each."""

from __future__ import annotations

import itertools
import os
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import torch

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_in_turn(processes: int) -> list[str | None]:
    """The GPU of each process, by the name that the environment has for it; None where there is none."""
    visible = os.environ.get(_VISIBLE)
    count = torch.cuda.device_count()
    names = visible.split(",")[:count] if visible else [str(index) for index in range(count)]
    return [names[index % count] if count else None for index in range(processes)]


class OneGpuEach(SpawnContext):
    """Starts processes that see one GPU each; a fork of a process that has used a GPU could not use it.

    Args:
        gpus: of the first process, the second and so on, then from the start; None leaves a process what this one sees.
    """

    def __init__(self, gpus: list[str | None]) -> None:
        super().__init__()
        self._gpus = itertools.cycle(gpus)

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        """A process that is not started yet."""
        process = _OneGpu(*args, **kwargs)
        process.gpu = next(self._gpus)
        return process


class _OneGpu(SpawnProcess):
    """A process whose environment names its GPU from its start: CUDA reads it once, when a library asks for GPUs,
    which some do while they are imported."""

    gpu: str | None = None

    def start(self) -> None:
        before = os.environ.get(_VISIBLE)
        if self.gpu is not None:
            os.environ[_VISIBLE] = self.gpu
        try:
            super().start()
        finally:
            if before is None:
                os.environ.pop(_VISIBLE, None)
            else:
                os.environ[_VISIBLE] = before
