"""How a model's blocks are called: each by way of a runner of its own, with something done around it.

A block gets a class derived from its own, one for all blocks of a kind, since a compiler that met another ``forward``
on each block would compile each by itself.
"""

from __future__ import annotations

from typing import Any


def forward_alone(block: Any, *inputs: Any, **named: Any) -> Any:
    """The forward that a block has by itself, without what its derived class does around it."""
    return block.forward_alone(*inputs, **named)
