"""FlashInfer's block-sparse attention: forward only, for inference; its fa3 kernels on Hopper, fa2 elsewhere.

Its key blocks are pages, and the number of keys must be a multiple of the page, so a page here is the largest power of
two that divides both the layout's block and the tokens: a partial last block is some whole pages. A layout is planned
once for each number of heads; plans share one workspace. The kernels are compiled on first use, which takes a minute or
two: for few tokens `choose_backend` takes another.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from radial.backends.base import AttentionCall, Layout
from radial.backends.imports import import_problem
from radial.backends.op import KernelBackend
from radial.layout import BlockLayout

_WORKSPACE_BYTES = 256 << 20


class FlashInfer(KernelBackend):
    """Compute capability 8.0 and later; bf16 and fp16; head dims 64, 128 and 256; no gradients, no padded text."""

    name = "flashinfer"
    gives_lse = False

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device.type != "cuda":
            return f"it needs a CUDA GPU, q is on {call.device.type}"
        capability = call.capability
        if capability < (8, 0):
            return f"it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
        if call.layout.by_head:
            return f"its lists serve all heads, and the {call.layout.pattern.name} pattern has a mask for each head"
        if call.needs_grad:
            return "it runs forward only, and this call needs gradients"
        if call.masks_text:
            return "it has no mask for padded text"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"q, k and v are {call.dtype}, its kernels take bfloat16 and float16"
        if call.head_dim not in (64, 128, 256):
            return f"head_dim is {call.head_dim}, expected 64, 128 or 256"
        return None if call.planned_for else import_problem("flashinfer", "flashinfer")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert isinstance(layout, BlockLayout)
        heads, dim = q.shape[2:]
        plan = layout.derived(
            ("flashinfer", heads, dim, q.dtype, scale), lambda: _plan(layout, heads, dim, q.dtype, scale)
        )
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for sample in zip(q.contiguous(), k.contiguous(), v.contiguous(), out, strict=True):
            plan.run(*sample[:3], out=sample[3])
        return out, q.new_empty(0, dtype=torch.float32)


@lru_cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _plan(layout: BlockLayout, heads: int, dim: int, dtype: torch.dtype, scale: float) -> Any:
    """The library's wrapper, planned for the layout."""
    from flashinfer import BlockSparseAttentionWrapper

    tokens, device = layout.grid.tokens, layout.columns.device
    offsets, pages, page = page_lists(layout)
    wrapper = BlockSparseAttentionWrapper(_workspace(device), backend="auto")
    wrapper.plan(
        *(offsets, pages, tokens, tokens, layout.block, page, heads, heads, dim),
        sm_scale=scale,
        q_data_type=dtype,
        kv_data_type=dtype,
        o_data_type=dtype,
    )
    return wrapper


def page_lists(layout: BlockLayout) -> tuple[Tensor, Tensor, int]:
    """The rows of a layout in pages: offsets (blocks + 1,) int32, pages (entries,) int32, tokens of a page."""
    tokens, block = layout.grid.tokens, layout.block
    page = math.gcd(tokens, block)
    within = torch.arange(block // page, dtype=torch.int32, device=layout.columns.device)
    pages = layout.columns[:, None] * len(within) + within
    exists = pages < tokens // page
    ends = torch.cat([exists.new_zeros(1, dtype=torch.int64), exists.sum(1).cumsum(0)])
    return ends[layout.row_offsets.long()].int(), pages[exists], page
