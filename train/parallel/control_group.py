"""A gloo process group on the CPU for small messages between ranks, separate from the group that moves tensors."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=2)  # `train.callbacks.watchdog` ends a wait before that, and names the rank that it was for


class ControlGroup:
    """All ranks of a run. Every rank must call its methods in the same order; alone, they return what they were given.

    Attributes:
        rank, world: of this process, once the group is open.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._group: Any = None

    def open(self, trainer: L.Trainer) -> None:
        """Forms the group; the strategy has set up torch.distributed by now. A second call does nothing."""
        self.rank, self.world = trainer.global_rank, trainer.world_size
        if self.world > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def first(self, count: int) -> ControlGroup:
        """The group of the first ``count`` ranks, for these alone to use. Every rank must call it."""
        if self._group is None or count >= self.world:
            return self
        part = ControlGroup()
        part.rank, part.world = self.rank, count
        if count > 1:
            part._group = dist.new_group(list(range(count)), backend="gloo", timeout=_PATIENCE)
        return part

    def close(self, patience: float = 60.0) -> bool:
        """Ends this and all other process groups while every rank is still there. Every rank must call it; a second
        call does nothing.

        NCCL's end can wait for ever where a rank comes to it minutes after the others, or not at all, as it would at
        the exits of the processes: rank 0 alone writes an export and a report.

        Args:
            patience: seconds for the end.

        Returns:
            False where it has not come by then, so that nothing may wait for it again.
        """
        if self._group is None:
            return True
        with suppress(RuntimeError):  # a rank that has been killed since it trained is waited for no longer
            dist.barrier(group=self._group)
        self._group = None
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def end() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            dist.destroy_process_group()

        thread = threading.Thread(target=end, name="closing", daemon=True)
        thread.start()
        thread.join(patience)
        return not thread.is_alive()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' CPU tensors."""
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, in the order of the ranks."""
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item, group=self._group)
        return items

    def from_first(self, item: Any) -> Any:
        """Rank 0's item."""
        if self._group is None:
            return item
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self._group)
        return items[0]

    def any(self, flags: list[bool]) -> list[bool]:
        """For each flag whether it is set on any rank."""
        return [bool(count) for count in self.sum(torch.tensor(flags, dtype=torch.int32))]
