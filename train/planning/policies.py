"""Which blocks keep what for their backward: as configured, or chosen so that a step fits and runs as little twice.

A block keeps its input (``full``), its input and attention's output (``selective``), or all that autograd saves
(``none``). What is kept lies on the GPU, or in CPU memory up to a limit, the first blocks' first
(`train.memory.offload`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from train.config.schema import ParallelConfig
from train.errors import UserError


@dataclass(frozen=True)
class BlockPolicies:
    """What each block keeps, and how much of it may lie in CPU memory.

    Attributes:
        names: ``none``, ``full`` or ``selective`` of each block, in the order in which they run.
        offload: bytes of CPU memory that each GPU's activations may take.
    """

    names: tuple[str, ...]
    offload: float = 0.0

    def count(self, name: str) -> int:
        """Blocks with that policy."""
        return self.names.count(name)

    def __str__(self) -> str:
        counts = {name: self.count(name) for name in ("full", "selective", "none") if name in self.names}
        text = " + ".join(f"{n} {name}" for name, n in counts.items())
        return text if len(counts) > 1 else next(iter(counts))


def configured(parallel: ParallelConfig, layers: int) -> BlockPolicies:
    """The policies of ``parallel.activations`` other than auto."""
    assert parallel.activations != "auto", "chosen, not configured"
    offload = 0.0
    if parallel.offload_activations:
        offload = math.inf if parallel.offload_gib is None else parallel.offload_gib * 2**30
    return BlockPolicies((parallel.activations,) * layers, offload)


def check_agreement(policies: BlockPolicies) -> None:
    """All ranks chose the same; otherwise their collectives would not meet. Every rank must call it.

    Raises:
        UserError: they did not: their machines differ.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, policies.names)
    other = next((rank for rank, names in enumerate(found) if names != found[0]), None)
    if other is not None:
        raise UserError(
            f"parallel.activations is auto, and blocks would keep {BlockPolicies(found[0])} on rank 0 but "
            f"{BlockPolicies(found[other])} on rank {other}, whose machine has other memory: set parallel.offload_gib "
            "to what every machine has, or parallel.activations=selective or full"
        )


def chosen(
    layers: int, dense_layers: int, limit: float, needed_offload: Callable[[Sequence[str]], float]
) -> BlockPolicies:
    """The policies that run least twice among those that fit, found by keeping more and more.

    Attention's output comes before all the rest, since a byte of it saves the most time; the dense layers' first, and
    then those of the last blocks, whose backward comes first.

    Args:
        layers, dense_layers: blocks, and how many of the first of them compute dense attention.
        limit: bytes of CPU memory that activations may take.
        needed_offload: bytes that do not fit on the GPU if blocks keep what the names say; infinite where even
            offloading them is of no help.
    """
    names = ["full"] * layers
    # a block that runs attention again holds more at once: keeping its output may fit where that does not
    if needed_offload(names) > limit >= needed_offload(["selective"] * layers):
        names = ["selective"] * layers
    for block in [*range(dense_layers), *reversed(range(dense_layers, layers))]:
        tried = [*names[:block], "selective", *names[block + 1 :]]
        if needed_offload(tried) > limit:
            break
        names = tried
    for block in reversed(range(layers)):
        tried = [*names[:block], "none", *names[block + 1 :]]
        if needed_offload(tried) > 0:  # keeping everything is worth no copies over the bus
            break
        names = tried
    offload = needed_offload(names)
    return BlockPolicies(tuple(names), min(offload, limit))
