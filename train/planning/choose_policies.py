"""Which layers keep what for their backward, chosen so that a step fits and as little as possible runs twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train.memory.layer_policies import LayerPolicies


def chosen(
    layers: int, dense_layers: int, limit: float, needed_offload: Callable[[Sequence[str]], float]
) -> LayerPolicies:
    """The policies that run least twice among those that fit, found by keeping more and more.

    Attention's output comes before all the rest, since a byte of it saves the most time; the dense layers' first, and
    then those of the last layers, whose backward comes first.

    Args:
        layers, dense_layers: how many there are, and how many of the first of them compute dense attention.
        limit: bytes of CPU memory that activations may take.
        needed_offload: bytes that do not fit on the GPU if layers keep what is named; infinite where even
            offloading them is of no help.
    """
    names = ["full"] * layers
    # a layer that runs attention again holds more at once: keeping its output may fit where that does not
    if needed_offload(names) > limit >= needed_offload(["selective"] * layers):
        names = ["selective"] * layers
    for layer in [*range(dense_layers), *reversed(range(dense_layers, layers))]:
        tried = [*names[:layer], "selective", *names[layer + 1 :]]
        if needed_offload(tried) > limit:
            break
        names = tried
    for layer in reversed(range(layers)):
        tried = [*names[:layer], "none", *names[layer + 1 :]]
        if needed_offload(tried) > 0:  # keeping everything is worth no copies over the bus
            break
        names = tried
    offload = needed_offload(names)
    return LayerPolicies(tuple(names), min(offload, limit))
