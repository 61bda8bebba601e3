"""Which attention each layer runs in one step: a micro-batch of training, or a sampling step.

Whether a training step is dense as a whole follows from its noise level, in `train.flow`. Where the pattern's blocks
are of tokens in an order of their own, the video's tokens lie in this order in all layers, the dense ones too, with
their positions: they are moved where they enter the layers and where they leave them, not around each attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from radial import BlockLayout, HeadLayout, build_head_layouts
from radial.reorder import reordered
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

    @property
    def moves_tokens(self) -> bool:
        """Whether `to_layers` changes anything."""
        return self.shard is not None or (self.pattern_layout.order is not None and not self.all_dense)

    def to_layers(self, x: Tensor, dim: int = 1) -> Tensor:
        """What the layers get of a tensor that has all video tokens in raster order: this rank's, in their order."""
        orders = self._orders(x)
        x = x if orders is None else reordered(x, *orders, dim)
        return x if self.shard is None else self.shard.slice(x, dim)

    def from_layers(self, x: Tensor) -> Tensor:
        """The inverse of `to_layers` for (batch, tokens, ...): all video tokens in raster order on every rank."""
        x = x if self.shard is None else self.shard.gather(x, 1)
        orders = self._orders(x)
        return x if orders is None else reordered(x, orders[1], orders[0])

    def _orders(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """The order of the video's tokens and its inverse, beside a tensor; None where it is the raster order."""
        whole = None if self.all_dense else self.pattern_layout.orders(x.device)
        video = self.pattern_layout.grid.video_tokens  # the text's keep their places behind them
        return None if whole is None else (whole[0][:video], whole[1][:video])

    def backend_of(self, layer: int) -> str | None:
        """The configured backend where the pattern runs; layers kept dense beside it take the fastest dense kernel."""
        return self.backend if self.layout(layer) is self.pattern_layout else None

    def attention_flops(self, layers: int, heads: int, head_dim: int) -> float:
        """Floating-point operations of self-attention in one forward of one sample."""
        return sum(self.layout(i).flops(heads, head_dim) for i in range(layers))
