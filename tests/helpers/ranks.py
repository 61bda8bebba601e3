"""Real processes for the tests of everything distributed: a gloo group on this machine."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world: int, target: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``target(*arguments)`` in ``world`` new processes that form a gloo group; their results by rank.

    ``target`` and its results must be picklable, and tensors come back as numpy arrays; it lies in a module that is
    imported by its name. What a rank raises is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run"])  # imported once, not once a process
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=context) as pool:
        # the group forms only when all are there, so that each process takes one task
        tasks = [pool.submit(_rank, rank, world, Path(folder) / "store", target, arguments) for rank in range(world)]
        return [task.result() for task in tasks]


def _rank(rank: int, world: int, store: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        return _plain(target(*arguments))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _plain(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return item.detach().numpy()
    if isinstance(item, dict):
        return {key: _plain(value) for key, value in item.items()}
    return [_plain(value) for value in item] if isinstance(item, (list, tuple)) else item
