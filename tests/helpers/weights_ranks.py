"""What the processes of tests/train/models/test_weights.py run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import train.parallel.zero
from train.config.compose import compose_run, finish
from train.memory.fp8_storage import store_fp8
from train.models.loading import load_adapter
from train.models.weights import stored_dtype
from train.parallel.zero import spread_weights, zero_config


def private_memory(folder: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Bytes of the model, and by how much loading and reading all of it makes this process's own memory grow."""
    config = finish(compose_run({"model.path": str(folder)})).model
    _load_libraries()
    before = _anonymous()
    adapter = load_adapter(config, dtype, seed=0)
    total = sum(p.abs().sum().item() for p in adapter.transformer.parameters())  # reads every page
    return {"grown": _anonymous() - before, "size": _bytes(adapter.transformer), "sum": total}


def _load_libraries() -> None:
    """Loads and reads a tiny model, so that what is measured after it is the model's memory and not its code's."""
    adapter = load_adapter(finish(compose_run({})).model, None, seed=0)
    sum(p.abs().sum().item() for p in adapter.transformer.parameters())


def _anonymous() -> int:
    """Memory that no other process can share, unlike a file's pages."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def shared_memory(folder: Path) -> dict[str, Any]:
    """By how much loading and reading the model on all ranks at once makes this rank's share of the memory grow.

    A page that several processes map counts for each by its part, so that the sum over the ranks is what the node has.
    """
    config = finish(compose_run({"model.path": str(folder)})).model
    _load_libraries()
    dist.barrier()
    before = _share()
    dist.barrier()
    adapter = load_adapter(config, None, seed=0)
    total = sum(p.sum().item() for p in adapter.transformer.parameters())
    dist.barrier()
    grown = _share() - before
    dist.barrier()  # nobody leaves while others measure
    return {"grown": grown, "size": _bytes(adapter.transformer), "sum": total}


def spread_memory(folder: Path) -> dict[str, Any]:
    """This process's own memory while ZeRO 3 spreads the model over the ranks, part by part: the most of it."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    settings = zero_config(3, bf16=False, offload_optimizer=False, offload_parameters=False)
    deepspeed.zero.Init(module=torch.nn.Linear(4, 4), config_dict_or_path=settings)  # what DeepSpeed itself takes
    config = finish(compose_run({"model.path": str(folder)})).model
    _load_libraries()
    before = _anonymous()
    adapter = load_adapter(config, None, seed=0)
    size = _bytes(adapter.transformer)
    settled = train.parallel.zero.settle

    def moved(transformer: Any, dtype: torch.dtype, device: str, each: Callable[[torch.nn.Module], None]) -> None:
        """Copies each part, as moving it to a GPU does; DeepSpeed broadcasts into what it gets."""

        def copied(part: torch.nn.Module) -> None:
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
            each(part)

        settled(transformer, dtype, device, copied)

    train.parallel.zero.settle = moved
    with Watch() as most:
        spread_weights(adapter.transformer, stored_dtype(folder), "cpu", settings)
    own = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in adapter.transformer.parameters())
    return {"most": most.bytes - before, "own": own, "size": size}


def rounded_memory(folder: Path) -> dict[str, Any]:
    """This process's own memory while the layers' weights get from the files into float8: the most of it, and its end.

    ``size`` is that of the layers in float8.
    """
    config = finish(compose_run({"model.path": str(folder)})).model
    _load_libraries()
    cpu, before = torch.device("cpu"), _anonymous()
    with Watch() as most:
        adapter = load_adapter(config, torch.bfloat16, seed=0, layers_on_cpu=True, as_stored=True)
        adapter.transformer.requires_grad_(False)
        store_fp8(adapter.layers(), cpu, cpu)
    size = sum(_bytes(layer) for layer in adapter.layers())
    return {"most": most.bytes - before, "end": _anonymous() - before, "size": size}


class Watch:
    """The most that this process's own memory comes to, looked at a thousand times a second."""

    def __enter__(self) -> Watch:
        self.bytes, self._stop = _anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _bytes(transformer: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in transformer.parameters())


def _share() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Pss:")) * 1024
