"""Which layers keep what for their backward.

A layer keeps its input (``full``), its input and attention's output (``selective``), or all that autograd saves
(``none``). What is kept lies on the GPU, or in CPU memory up to a limit, the first layers' first
(`train.memory.offload`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from train.config.schema import ParallelConfig
from train.errors import UserError


@dataclass(frozen=True)
class LayerPolicies:
    """What each layer keeps, and how much of it may lie in CPU memory.

    Attributes:
        names: ``none``, ``full`` or ``selective`` of each layer, in the order in which they run.
        offload: bytes of CPU memory that each GPU's activations may take.
    """

    names: tuple[str, ...]
    offload: float = 0.0

    def count(self, name: str) -> int:
        """Layers with that policy."""
        return self.names.count(name)

    def __str__(self) -> str:
        counts = {name: self.count(name) for name in ("full", "selective", "none") if name in self.names}
        text = " + ".join(f"{n} {name}" for name, n in counts.items())
        return text if len(counts) > 1 else next(iter(counts))


def configured(parallel: ParallelConfig, layers: int) -> LayerPolicies:
    """The policies of ``parallel.activations`` other than auto."""
    assert parallel.activations != "auto", "chosen by train.planning.choose_policies"
    offload = 0.0
    if parallel.offload_activations:
        offload = math.inf if parallel.offload_gib is None else parallel.offload_gib * 2**30
    return LayerPolicies((parallel.activations,) * layers, offload)


def check_agreement(policies: LayerPolicies) -> None:
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
            f"parallel.activations is auto, and layers would keep {LayerPolicies(found[0])} on rank 0 but "
            f"{LayerPolicies(found[other])} on rank {other}, whose machine has other memory: set parallel.offload_gib "
            "to what every machine has, or parallel.activations=selective or full"
        )
