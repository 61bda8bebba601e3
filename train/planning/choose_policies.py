"""Which blocks keep what for their backward, chosen so that a step fits and as little as possible runs twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train.memory.block_policies import BlockPolicies


def chosen(
    layers: int, dense_layers: int, limit: float, needed_offload: Callable[[Sequence[str]], float]
) -> BlockPolicies:
    """The policies that run least twice among those that fit, found by keeping more and more.

    Attention's output comes before all the rest, since a byte of it saves the most time; the dense layers' first, and
    then those of the last blocks, whose backward comes first.

    Args:
        layers, dense_layers: blocks, and how many of the first of them compute dense attention.
        limit: bytes of CPU memory that activations may take.
        needed_offload: bytes that do not fit on the GPU if blocks keep what is named; infinite where even
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
