"""torch's FlexAttention (Triton): forward and backward on any CUDA GPU from Ampere on.

Kept blocks are its "full" blocks, computed without a mask function; text columns are "partial" blocks where samples
have padding. Inside a compiled model the call becomes part of the graph; elsewhere it is compiled here.

Where masks differ by head, the lists of all layers and heads are on the device together, since the graph of a compiled
block serves every layer and takes its lists by the layer's number.

torch chooses the kernels' tiles by the GPU's compute capability (`torch/_inductor/template_heuristics`, alike in torch
2.11 to 2.13). `kernel_options` replaces the forward's where they do not divide the layout's blocks or take more than
the shared memory of the GPUs that have least. The backward's cannot be replaced: torch drops its choice where it does
not divide the block before it looks at the options, and has no other. `Flex.why_not` says where that is.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from radial.backends.base import AttentionCall, Layout
from radial.backends.lists import Lists, block_lists, masked_counts
from radial.head_layouts import HeadLayout, HeadLayouts
from radial.layout import BlockLayout

_HEAD_LISTS_BYTES = 8 << 30  # of masks that differ by head; more than this is refused
_SMALL_SHARED_MEMORY = (
    (8, 6),
    (8, 9),
    (12, 0),
    (12, 1),
)  # have 99 KiB for a thread block, others 163 or 227


class Flex:
    """Compute capability 8.0 and later; bf16, fp16 and fp32; head dims that are powers of two; blocks of 64 and 128."""

    name = "flex"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device.type != "cuda":
            return f"it needs a CUDA GPU, q is on {call.device.type}"
        capability = call.capability
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"q, k and v are {call.dtype}, it takes bfloat16, float16 and float32"
        if call.head_dim not in (16, 32, 64, 128, 256):
            return f"head_dim is {call.head_dim}, expected a power of two from 16 to 256"
        if call.layout.block not in (64, 128):
            return f"the layout's blocks are {call.layout.block} tokens, expected 64 or 128"
        if call.head_dim == 256 and capability in _SMALL_SHARED_MEMORY:
            return "head_dim is 256, whose tiles do not fit this GPU's 99 KiB of shared memory"
        if call.needs_grad and call.layout.block < _backward_tile(capability, call.dtype, call.head_dim):
            return (
                f"torch's backward for {call.dtype} and head_dim {call.head_dim} on compute capability {capability[0]}."
                f"{capability[1]} has tiles of 128 tokens, the layout's blocks are {call.layout.block}"
            )
        if isinstance(call.layout, HeadLayouts):
            # two directions, each with full and masked lists, int32, as long as the whole rows of the last block
            heads, layers = call.layout.own, call.layout.layers
            size = 16 * layers * heads * call.layout.blocks**2
            if size > _HEAD_LISTS_BYTES:
                return (
                    f"its lists of {call.layout.own} heads in {call.layout.layers} layers take {size / 2**30:.0f} GiB"
                )
        return None

    def prepare(self, call: AttentionCall) -> None:
        """Builds the lists ahead of the call, so that a compiler that traces the call finds them."""
        if isinstance(call.layout, HeadLayouts):
            _head_lists(call.layout, call.masks_text, call.device)
        else:
            _lists(call.layout.to(call.device), call.masks_text)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, text_lengths: Tensor | None, scale: float
    ) -> Tensor:
        mask = block_mask(layout, len(q), text_lengths, q.device)
        run = _flex_attention if torch.compiler.is_compiling() else _compiled()
        options = self.options(layout, q)
        return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale, options).transpose(1, 2)

    def options(self, layout: Layout, q: Tensor) -> dict[str, Any] | None:
        """FlexAttention's ``kernel_options`` of a call; None leaves them to torch."""
        return kernel_options(layout.block, q.dtype, q.shape[-1])


def kernel_options(block: int, dtype: torch.dtype, head_dim: int) -> dict[str, Any] | None:
    """The forward's tiles where torch's own do not serve, else None; ``block`` in tokens.

    torch's are 128 queries for head dims 64 and 128 on nearly every GPU, which do not divide blocks of 64; and those of
    float32 and head dim 128 take 113 to 145 KiB where a thread block has 99. These fit everywhere.
    """
    large = dtype == torch.float32 and head_dim == 128
    if not large and (block >= 128 or head_dim not in (64, 128)):
        return None
    keys, stages = (32, 2) if large else (64, 3)
    return {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": keys, "fwd_num_stages": stages, "fwd_num_warps": 4}


def _backward_tile(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> int:
    """The longer side of the tiles of torch's backward, in tokens."""
    if dtype == torch.float32:
        return 16
    if capability == (9, 0) and head_dim < 64:
        return 64
    return 128 if head_dim < 64 or (capability[0] in (9, 10) and head_dim <= 128) else 64


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, options: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # fullgraph: past the compiler's limit of shapes this is an error, not the dense fallback that eager would be
    return torch.compile(_flex_attention, fullgraph=True)


def _lists(layout: BlockLayout, masks_text: bool) -> tuple[Lists, Lists, Tensor]:
    """Forward and backward lists, and the number of keys that count without text lengths, (1,)."""
    masks = _masks(layout, masks_text)

    def both() -> tuple[Lists, Lists, Tensor]:
        every = torch.tensor([layout.grid.tokens], dtype=torch.int32, device=layout.columns.device)
        return _make(layout, masks, every, False), _make(layout, masks, every, True), every

    return layout.derived(("flex", masks), both)


def _head_lists(layouts: HeadLayouts, masks_text: bool, device: torch.device) -> tuple[Lists, Lists, Tensor]:
    """`_lists` of masks that differ by head: every tensor with all layers along a dimension before the others."""
    masks = _masks(layouts, masks_text)

    def both() -> tuple[Lists, Lists, Tensor]:
        every = torch.tensor([layouts.grid.tokens], dtype=torch.int32, device=device)
        directions = []
        for backward in (False, True):
            found = [_make(layouts.layer(i), masks, every, backward) for i in range(layouts.layers)]
            width = max(lists.full.shape[-1] for lists in found)
            found = [_widened(lists, width) for lists in found]
            directions.append(Lists(*(torch.stack(tensors) for tensors in zip(*found, strict=True))))
        return directions[0], directions[1], every

    return layouts.derived(("flex", masks, str(device)), both)


def _masks(layout: BlockLayout | HeadLayouts, masks_text: bool) -> bool:
    """Whether there are masked lists: FlexAttention checks the sequence's end in partial blocks only."""
    return masks_text or layout.grid.tokens % layout.block > 0


def _make(layout: Layout, masks: bool, every: Tensor, backward: bool) -> Lists:
    """The lists of one direction; ``every`` is the number of keys that count without text lengths, (1,)."""
    lists = block_lists(layout, backward=backward, masks=masks, scheduled=False, device=every.device)
    if masks:
        lists = lists._replace(masked_count=masked_counts(layout, every, backward=backward))
    lists = _widened(lists, max(lists.masked.shape[-1], lists.full.shape[-1]))
    heads = lists.full.shape[1]
    return lists._replace(
        masked_count=lists.masked_count.expand(-1, heads, -1).contiguous(),
        masked=lists.masked.expand(-1, heads, -1, -1).contiguous(),
    )


def _widened(lists: Lists, width: int) -> Lists:
    """Index tensors of one width: FlexAttention finds a tile's place in both by the strides of one."""
    masked, full = (F.pad(t, (0, width - t.shape[-1])).contiguous() for t in (lists.masked, lists.full))
    return lists._replace(masked=masked, full=full)


def block_mask(layout: Layout, batch: int, text_lengths: Tensor | None, device: torch.device) -> Any:
    """FlexAttention's `BlockMask` of a layout.

    Args:
        layout: whose lists `Flex.prepare` made.
        batch: samples.
        text_lengths: (batch,) integer, valid text tokens of each sample, or None.
        device: of the lists.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if isinstance(layout, HeadLayout):
        every_row, every_column, every = _head_lists(layout.family, text_lengths is not None, device)
        layer = layout.layer.to(device)
        rows, columns = (Lists(*(t[layer] for t in lists)) for lists in (every_row, every_column))
    else:
        rows, columns, every = _lists(layout.to(device), text_lengths is not None)
    valid = every.expand(batch)
    if text_lengths is not None:
        heads = rows.full.shape[1]
        valid = layout.grid.video_tokens + text_lengths.int()
        own = (masked_counts(layout, valid, backward=backward).expand(-1, heads, -1) for backward in (False, True))
        rows, columns = (
            _for_each_sample(lists._replace(masked_count=count), batch)
            for lists, count in zip((rows, columns), own, strict=True)
        )

    def counts(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < valid[sample]

    return BlockMask(
        (layout.grid.tokens, layout.grid.tokens),
        *(rows.masked_count, rows.masked, rows.full_count, rows.full),
        *(columns.masked_count, columns.masked, columns.full_count, columns.full),
        (layout.block, layout.block),
        counts,
    )


def _for_each_sample(lists: Lists, batch: int) -> Lists:
    """The lists repeated, since the kernels find all of them by one batch index."""
    return Lists(*(t if t is lists.order else t.expand(batch, *t.shape[1:]).contiguous() for t in lists))
