"""What takes the place of a diffusers model's own attention processors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from radial import BlockLayout, HeadLayout
from train.attention.sequence import SequenceShard, sharded_attention


class LayoutAttention:
    """Base of the attention processors: `ModelAdapter.set_attention` gives each the layout of its layer."""

    def __init__(self) -> None:
        self.layout: BlockLayout | HeadLayout | None = None
        self.backend: str | None = None
        self.shard: SequenceShard | None = None
        self.observer: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None] | None = None
        """Is given q, k, v, attention's output and the text lengths of each `attend` (`train.decay.capture`)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor | None = None) -> Tensor:
        """Attention over the layer's layout.

        Args:
            q, k, v: (batch, this rank's video tokens + all text tokens, heads, head_dim).
            text_lengths: as for `radial.attention_over`.
        """
        assert self.layout is not None, "set_attention comes before the forward"
        out = sharded_attention(q, k, v, self.layout, self.shard, text_lengths=text_lengths, backend=self.backend)
        if self.observer is not None:
            self.observer(q, k, v, out, text_lengths)
        return out
