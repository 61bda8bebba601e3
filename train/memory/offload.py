"""Kept activations in CPU memory: copied out while the forward goes on, and back before the backward needs them.

Page-locked memory copies at the bus's full rate and beside the GPU's work. torch's pinned allocator rounds sizes up to
a power of two (2.99 GB takes 4.29), so buffers are ordinary memory of the exact size that CUDA is asked to lock; they
are kept for the next step. On a CPU the tensors are copied too: slower and pointless, but the same path.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AHEAD = 2  # tensors on their way back while the backward works on one


@dataclass(eq=False)
class Stored:
    """A tensor that lies in CPU memory."""

    buffer: Tensor  # uint8, page-locked on a machine with CUDA
    like: Tensor  # meta tensor: shape, strides, dtype
    device: torch.device
    done: Any = None  # event after the last copy
    returned: Tensor | None = None  # on its device again


class Offload:
    """Moves tensors out (`put`) and back (`get`) on a stream of its own.

    Each `get` also starts bringing back what was stored last, which the backward needs next.

    Args:
        least: smaller tensors stay where they are, in bytes.
        limit: bytes of CPU memory to take at most. Once it is full tensors stay: those of the last layers, which the
            backward needs first.

    Attributes:
        locked: bytes of all buffers.
    """

    def __init__(self, least: int = 2**20, limit: float = math.inf) -> None:
        self.least, self.limit = least, limit
        self.locked = 0
        self._used = 0  # bytes of the buffers that hold a tensor
        self._most = 0  # that were ever in use at once
        self._stored: dict[Stored, None] = {}  # in the order of `put`
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._unlock: dict[int, Callable[[], Any]] = {}  # address -> what unlocks the buffer
        self._streams: dict[torch.device, Any] = {}

    @property
    def stored(self) -> int:
        """Tensors that lie in CPU memory now."""
        return len(self._stored)

    @property
    def spare(self) -> list[int]:
        """The sizes of the buffers that hold nothing now, in bytes."""
        return [buffer.numel() for buffers in self._free.values() for buffer in buffers]

    def put(self, x: Tensor) -> Tensor | Stored:
        """Starts the copy to the CPU; the caller drops ``x`` when it has no more use for it."""
        size = x.numel() * x.element_size()
        if size < max(self.least, 1):
            return x
        buffer = self._buffer(size, x.device)
        if buffer is None:
            return x
        stored = Stored(buffer, torch.empty_like(x, device="meta"), x.device)
        self._stored[stored] = None
        target = stored.buffer.view(x.dtype).as_strided(stored.like.shape, stored.like.stride())
        if x.device.type != "cuda":
            target.copy_(x)
            return stored
        stream = self._stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            target.copy_(x, non_blocking=True)
            stored.done = stream.record_event()
        x.record_stream(stream)
        return stored

    def get(self, stored: Tensor | Stored) -> Tensor:
        """The tensor, on its device again."""
        if isinstance(stored, Tensor):
            return stored
        del self._stored[stored]
        for wanted in (stored, *itertools.islice(reversed(self._stored), _AHEAD)):
            self._bring_back(wanted)
        x = stored.returned
        assert x is not None
        if stored.done is not None:
            current = torch.cuda.current_stream(x.device)
            current.wait_event(stored.done)
            x.record_stream(current)
        stored.returned = None
        self._used -= stored.buffer.numel()
        self._free[stored.buffer.numel()].append(stored.buffer)
        return x

    def _bring_back(self, stored: Stored) -> None:
        if stored.returned is not None:
            return
        source = stored.buffer.view(stored.like.dtype).as_strided(stored.like.shape, stored.like.stride())
        if stored.device.type != "cuda":
            stored.returned = torch.empty_like(stored.like, device=stored.device).copy_(source)
            return
        with torch.cuda.stream(self._stream(stored.device)):
            stored.returned = torch.empty_like(stored.like, device=stored.device)
            stored.returned.copy_(source, non_blocking=True)
            stored.done = self._stream(stored.device).record_event()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _buffer(self, size: int, device: torch.device) -> Tensor | None:
        if not self._free[size]:
            # steps of other clips have left buffers of other sizes: no more is locked than one step has needed
            self._release(self.locked + size - min(self.limit, max(self._most, self._used + size)))
            if self.locked + size > self.limit:
                return None
            self.locked += size
            buffer = torch.empty(size, dtype=torch.uint8)
            self._unlock[buffer.data_ptr()] = page_lock(buffer, device, self)
            self._free[size].append(buffer)
        self._used += size
        self._most = max(self._most, self._used)
        return self._free[size].pop()

    def _release(self, excess: float) -> None:
        """Gives back unused buffers of ``excess`` bytes together, as far as there are any."""
        for size, buffers in self._free.items():
            while excess > 0 and buffers:
                buffer = buffers.pop()
                self._unlock.pop(buffer.data_ptr())()
                self.locked -= size
                excess -= size


def page_lock(buffer: Tensor, device: torch.device, owner: object) -> Callable[[], Any]:
    """Has CUDA lock memory, which it then copies from and to at the bus's full rate; on other devices it is as it was.

    Memory that is given back while it is locked makes CUDA refuse what comes to lie there next. So the buffer stays
    until it is unlocked: by a call of what is returned, or once ``owner`` is gone.
    """
    if device.type != "cuda":
        return lambda: None
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)))
    unlock = weakref.finalize(owner, _unlock, buffer, device)
    unlock.atexit = False  # the driver is going then, and its memory with it
    return unlock


def _unlock(buffer: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a last copy may still be on the way
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
