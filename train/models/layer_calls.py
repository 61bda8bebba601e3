"""How a model's layers are called: each by way of a runner of its own, with something done around it.

A layer gets a class derived from its own, one for all layers of a kind, since a compiler that met another ``forward``
on each layer would compile each by itself.
"""

from __future__ import annotations

from typing import Any


def forward_alone(layer: Any, *inputs: Any, **named: Any) -> Any:
    """The forward that a layer has by itself, without what its derived class does around it."""
    return layer.forward_alone(*inputs, **named)
