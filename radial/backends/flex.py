"""torch's FlexAttention (Triton): forward and backward on any CUDA GPU from Ampere on.

Kept blocks are its "full" blocks, computed without a mask function; text columns are "partial" blocks where samples
have padding. Inside a compiled model the call becomes part of the graph; elsewhere it is compiled here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from radial.backends.base import AttentionCall
from radial.backends.lists import Lists, block_lists, masked_counts
from radial.layout import BlockLayout


class Flex:
    """Compute capability 8.0 and later; bf16, fp16 and fp32; head dims that are powers of two; blocks of 64 and 128."""

    name = "flex"

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device.type != "cuda":
            return f"it needs a CUDA GPU, q is on {call.device.type}"
        capability = torch.cuda.get_device_capability(call.device)
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if call.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"q, k and v are {call.dtype}, it takes bfloat16, float16 and float32"
        if call.head_dim not in (16, 32, 64, 128, 256):
            return f"head_dim is {call.head_dim}, expected a power of two from 16 to 256"
        if call.layout.block not in (64, 128):
            return f"the layout's blocks are {call.layout.block} tokens, expected 64 or 128"
        return None

    def prepare(self, call: AttentionCall) -> None:
        """Builds the lists ahead of the call, so that a compiler that traces the call finds them."""
        _lists(call.layout.to(call.device), call.masks_text)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, text_lengths: Tensor | None, scale: float
    ) -> Tensor:
        mask = _block_mask(layout.to(q.device), len(q), text_lengths)
        run = _flex_attention if torch.compiler.is_compiling() else _compiled()
        return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale).transpose(1, 2)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, scale=scale)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    # fullgraph: past the compiler's limit of shapes this is an error, not the dense fallback that eager would be
    return torch.compile(_flex_attention, fullgraph=True)


def _lists(layout: BlockLayout, masks_text: bool) -> tuple[Lists, Lists, Tensor]:
    """Forward and backward lists, and the number of keys that count without text lengths, (1,).

    FlexAttention checks the sequence's end in partial blocks only, so a partial last block is in the masked lists.
    """
    masks = masks_text or layout.grid.tokens % layout.block > 0

    def make(backward: bool, every: Tensor) -> Lists:
        lists = block_lists(layout, backward=backward, masks=masks, scheduled=False)
        if masks:
            lists = lists._replace(masked_count=masked_counts(layout, every, backward=backward))
        # its kernels find a tile's place in both index tensors by the strides of one
        width = max(lists.masked.shape[-1], lists.full.shape[-1])
        masked, full = (F.pad(t, (0, width - t.shape[-1])).contiguous() for t in (lists.masked, lists.full))
        return lists._replace(masked=masked, full=full)

    def both() -> tuple[Lists, Lists, Tensor]:
        every = torch.tensor([layout.grid.tokens], dtype=torch.int32, device=layout.columns.device)
        return make(False, every), make(True, every), every

    return layout.derived(("flex", masks), both)


def _block_mask(layout: BlockLayout, batch: int, text_lengths: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns, every = _lists(layout, text_lengths is not None)
    valid = every.expand(batch)
    if text_lengths is not None:
        valid = layout.grid.video_tokens + text_lengths.int()
        rows = rows._replace(masked_count=masked_counts(layout, valid, backward=False))
        columns = columns._replace(masked_count=masked_counts(layout, valid, backward=True))
        rows, columns = _for_each_sample(rows, batch), _for_each_sample(columns, batch)

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
