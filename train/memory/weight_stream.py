"""Frozen weights of layers that stream: they lie in CPU memory, and come to the device just before their layer runs.

    CPU     one slab with the layers' frozen weights, one after the other, page-locked on a machine with CUDA
    device  a ring of slots, each as large as the largest layer; layer i's place is slot i modulo their number

A parameter of a streamed layer is a view of its slot, for good: nothing is exchanged when a layer's turn comes, only
bytes are copied, so that compiled graphs and what autograd has saved keep pointing to the right place. What has to hold
is that a layer's weights are in its slot whenever it computes: in its forward, in its backward, and where it runs again
inside of that. `WeightStream.arrive` sees to it before a forward; before a backward a node of autograd's does, which
stands behind the layer's outputs. Autograd runs what was made last first, so that all of a layer's backward lies
between its own node and that of the layer before it.

Every arrival also starts the copies of the layers that come next, on a stream of their own. A copy waits for the work
that was under way on the device when it was asked for: the layer whose slot it takes is then done.

Processes of one machine share one slab. It is a file in memory without a name, gone with its last process. What is
trained, LoRA weights and buffers stay on the device.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from train.memory.offload import page_lock
from train.models.layer_calls import forward_alone

_ALIGNED = 256  # bytes that each tensor starts at a multiple of

SLOTS = 2
"""Layers on the device at a time: the one that runs, and the next on its way."""


class WeightStream:
    """The frozen weights of a model's layers, in CPU memory, with a ring of slots on the device.

    Args:
        chains: the layers in the order in which they run, apart for each transformer of the model. Their frozen weights
            are on the CPU, in the dtype that they are to have.
        device: where the layers run.
        slots: of the ring, at least 2.

    Attributes:
        holds: the layer in each slot, or on its way there.
        hosts: the slab's part of each layer, once it is placed.
        ring: the slots on the device, in bytes, uint8, once they are placed.
    """

    def __init__(self, chains: Sequence[Sequence[nn.Module]], device: torch.device, slots: int = SLOTS) -> None:
        self.device = device
        self._layers = [layer for chain in chains for layer in chain]
        self._index = {id(layer): index for index, layer in enumerate(self._layers)}
        ends = list(itertools.accumulate((len(chain) for chain in chains), initial=0))
        self._chain = [range(low, high) for low, high in itertools.pairwise(ends) for _ in range(low, high)]
        self._parts = [_packed(layer) for layer in self._layers]
        self._sizes = [max((end for *_, end in parts), default=0) for parts in self._parts]
        self.slots = slots
        self.holds: list[int | None] = [None] * slots
        self._ready: list[Any] = [None] * slots  # events after the copies into each slot
        self._last = -1
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._slab: Tensor | None = None
        self.ring: list[Tensor] = []
        for layer in self._layers:
            _stay(layer, device)

    @property
    def slab_bytes(self) -> int:
        """CPU memory of the weights, one copy for all processes of a machine."""
        return sum(self._sizes)

    @property
    def ring_bytes(self) -> int:
        """Device memory of the ring."""
        return self.slots * max(self._sizes)

    def place(self) -> None:
        """Moves the weights into the slab, and makes them views of the ring. A second call does nothing.

        Every rank must call it: those of a machine share the slab, which the first of them fills.
        """
        if self._slab is not None:
            return
        slab, fills, agree = _shared_slab(self.slab_bytes)
        starts = list(itertools.accumulate(self._sizes, initial=0))
        self.ring = [torch.zeros(max(self._sizes), dtype=torch.uint8, device=self.device) for _ in range(self.slots)]
        for index, parts in enumerate(self._parts):
            slot = self.ring[index % self.slots]
            for parameter, start, end in parts:
                if fills:
                    place = slab[starts[index] + start : starts[index] + end]
                    place.view(parameter.dtype).view(parameter.shape).copy_(parameter.data)
                parameter.data = slot[start:end].view(parameter.dtype).view(parameter.shape)
        agree()
        page_lock(slab, self.device, self)
        self._slab = slab
        self.hosts = [slab[low:high] for low, high in itertools.pairwise(starts)]

    def arrive(self, layer: nn.Module) -> None:
        """Has a layer's weights on the device for what is computed next, and the following ones on their way."""
        self.place()
        index = self._index[id(layer)]
        self.fetch(index)
        for near in self._following(index):
            self.fetch(near)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[index % self.slots])
        self._last = index

    def returning(self, layer: nn.Module, out: Any) -> Any:
        """A layer's outputs, a tensor or several, with an arrival at the beginning of the layer's backward."""
        several = out if isinstance(out, tuple) else (out,)
        if not any(isinstance(x, Tensor) and x.requires_grad for x in several):
            return out
        passed = _Returning.apply(self, layer, *several)
        return passed if isinstance(out, tuple) else passed[0]

    def _following(self, index: int) -> list[int]:
        """The layers that come next: in a backward those before, which is seen from the layer that ran last."""
        chain = self._chain[index]
        back = index == chain[-1] if index == self._last else index == self._last - 1
        step = -1 if back and index != chain[0] else 1
        ahead = range(index + step, index + step * self.slots, step)
        return [near for near in ahead if near in chain]

    def fetch(self, index: int) -> None:
        """Starts the copy of a layer into its slot, unless it is there or on its way."""
        slot = index % self.slots
        if self.holds[slot] == index:
            return
        self.holds[slot] = index
        source, target = self.hosts[index], self.ring[slot][: self._sizes[index]]
        if self._copies is None:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            self._ready[slot] = self._copies.record_event()


class _Returning(torch.autograd.Function):
    """Hands a layer's outputs on; its backward, the first of the layer's, has the weights come."""

    @staticmethod
    def forward(ctx: Any, stream: WeightStream, layer: nn.Module, *outputs: Any) -> Any:
        ctx.stream, ctx.layer = stream, layer
        return tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.stream.arrive(ctx.layer)
        return None, None, *grads


def stream_layer(
    layer: Any, stream: WeightStream, run: Callable[..., Any], alone: Callable[..., Any] = forward_alone
) -> None:
    """Makes a layer have its weights come by a stream when it is called.

    Args:
        run: what runs the layer where there are gradients, ``run(layer, *inputs)``, by way of `forward_alone`.
        alone: what runs it where there are none, with any inputs.
    """
    layer.weight_stream, layer.run_streamed, layer.run_streamed_alone = stream, run, alone
    layer.__class__ = _streamed(type(layer))  # type: ignore[arg-type]


@functools.cache
def _streamed(kind: Any) -> Any:
    """A class for all layers of a kind, so that they share compiled graphs."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        self.weight_stream.arrive(self)
        if not torch.is_grad_enabled():
            return self.run_streamed_alone(self, *inputs, **named)
        assert not named, "called by other means than diffusers' gradient checkpointing"
        return self.weight_stream.returning(self, self.run_streamed(self, *inputs))

    return type(f"Streamed{kind.__name__}", (kind,), {"forward": forward, "forward_alone": kind.forward})


def _frozen(layer: nn.Module) -> list[Parameter]:
    """What a stream moves: no LoRA, and nothing that is trained."""
    return [p for name, p in layer.named_parameters() if not p.requires_grad and ".lora_" not in name]


def _packed(layer: nn.Module) -> list[tuple[Parameter, int, int]]:
    """A layer's frozen parameters with the bytes that each takes of a slot, from and up to."""
    found, start = [], 0
    for parameter in _frozen(layer):
        found.append((parameter, start, start + parameter.nbytes))
        start += -(-parameter.nbytes // _ALIGNED) * _ALIGNED
    return found


def _stay(layer: nn.Module, device: torch.device) -> None:
    moved = {id(parameter) for parameter in _frozen(layer)}
    for parameter in layer.parameters():
        if id(parameter) not in moved:
            parameter.data = parameter.data.to(device)
    for module in layer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def _shared_slab(size: int) -> tuple[Tensor, bool, Callable[[], None]]:
    """Memory for the weights, whether this rank fills it, and what waits until all of its machine is filled.

    Ranks that cannot open the first one's memory, as in containers with processes of their own, keep a copy each.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return torch.empty(size, dtype=torch.uint8), True, lambda: None
    rank, world = dist.get_rank(), dist.get_world_size()
    machine = (socket.gethostname(), Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8"))
    machines: list[Any] = [None] * world
    dist.all_gather_object(machines, machine)
    first = machines.index(machine)
    name, file = f"frozen-weights-{os.urandom(8).hex()}", -1
    if rank == first:
        file = os.memfd_create(name)
        os.ftruncate(file, size)
    places: list[Any] = [None] * world
    dist.all_gather_object(places, (os.getpid(), file, name))
    if rank != first:
        file = _opened(*places[first])
    opened: list[Any] = [None] * world
    dist.all_gather_object(opened, file >= 0)
    if not all(opened):
        if rank == first:
            print(
                f"processes of {machine[0]} cannot open each other's memory: each keeps its own copy of the frozen "
                f"weights, {size / 2**30:.1f} GiB"
            )
        return torch.empty(size, dtype=torch.uint8), True, lambda: None
    slab = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)

    def agree() -> None:
        dist.all_gather_object([None] * world, rank)  # works with every backend, and ends when all have come
        os.close(file)

    return slab, rank == first, agree


def _opened(process: int, file: int, name: str) -> int:
    """Another process's file in memory; -1 where it cannot be had."""
    place = Path(f"/proc/{process}/fd/{file}")
    try:
        if name not in str(place.readlink()):
            return -1  # of a process with the same number elsewhere
        return os.open(place, os.O_RDWR)
    except OSError:
        return -1
