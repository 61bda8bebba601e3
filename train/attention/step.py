"""Which attention each layer runs in one step: a micro-batch of training, or a sampling step.

Whether a training step is dense as a whole follows from its noise level, in `train.flow`.
"""

from __future__ import annotations

from dataclasses import dataclass

from radial import BlockLayout, HeadLayout, build_head_layouts
from train.attention.sequence import SequenceShard


@dataclass(frozen=True)
class StepAttention:
    """Fixed from a micro-batch's forward until its backward has run, because checkpointing calls forward again.

    Attributes:
        pattern_layout: block lists of the configured pattern; where its masks differ by head, those of
            one that stands for all.
        dense_layout: the full layout of the same grid.
        dense_layers: the first layers, which stay dense.
        all_dense: all layers are dense in this step.
        backend: an attention backend by name, or None for the fastest.
        shard: this rank's share of the sequence, or None where each rank holds whole samples.
    """

    pattern_layout: BlockLayout
    dense_layout: BlockLayout
    dense_layers: int = 0
    all_dense: bool = False
    backend: str | None = None
    shard: SequenceShard | None = None

    def layout(self, layer: int) -> BlockLayout:
        """The layout of a layer's self-attention; where masks differ by head, one that stands for them."""
        return self.dense_layout if self.all_dense or layer < self.dense_layers else self.pattern_layout

    def own_layout(self, layer: int, layers: int, heads: int) -> BlockLayout | HeadLayout:
        """What this rank's self-attention of a layer runs, in a model of so many layers and heads."""
        layout = self.layout(layer)
        if not layout.pattern.by_head:
            return layout
        whole = build_head_layouts(layout.pattern, layout.grid, layout.block, layers=layers, heads=heads)
        group = None if self.shard is None else self.shard.group
        return (whole if group is None else whole.part(group.rank, group.size)).layer(layer)

    def backend_of(self, layer: int) -> str | None:
        """The configured backend where the pattern runs; layers kept dense beside it take the fastest dense kernel."""
        return self.backend if self.layout(layer) is self.pattern_layout else None

    def attention_flops(self, layers: int, heads: int, head_dim: int) -> float:
        """Floating-point operations of self-attention in one forward of one sample."""
        return sum(self.layout(i).flops(heads, head_dim) for i in range(layers))
