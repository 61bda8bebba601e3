"""Looking at a model's self-attention in its own forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from train.models.base import ModelAdapter


@dataclass(frozen=True)
class Attended:
    """What a self-attention computed for one sample.

    Attributes:
        q, k, v: (tokens, heads, head_dim), video then text, as attention gets them: after norms and rotary embedding.
        out: of the same shape.
        text_tokens: how many of the text tokens count as keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    text_tokens: int


@contextmanager
def observed(adapter: ModelAdapter, layers: Collection[int], see: Callable[[int, Attended], None]) -> Iterator[None]:
    """Calls ``see`` with the layer's number and what its attention computed, in every forward of one sample inside.

    Of two experts, of which one runs in a forward, layers of the same number stand for each other.

    Args:
        layers: numbers from 0.
    """
    count = adapter.attention_shape[0]
    processors = {
        number: adapter.self_attention(layer).processor
        for number, layer in enumerate(adapter.layers())
        if number % count in layers
    }

    def observer(layer: int) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]:
        def observe(q: Tensor, k: Tensor, v: Tensor, out: Tensor, text_lengths: Tensor | None) -> None:
            assert len(q) == 1, "one sample at a time"
            text = processors[layer].layout.grid.text_tokens
            text = text if text_lengths is None else int(text_lengths.clamp(0, text))
            see(layer % count, Attended(q[0], k[0], v[0], out[0], text))

        return observe

    for number, processor in processors.items():
        processor.observer = observer(number)
    try:
        yield
    finally:
        for processor in processors.values():
            processor.observer = None
