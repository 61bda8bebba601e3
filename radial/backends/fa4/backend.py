"""flash-attn-4 (`flash_attn.cute`) on Hopper: the training default where it runs.

Layouts that skip blocks go through the library's block-sparse kernels (`radial.backends.fa4.hopper`) with a schedule
of ours (`radial.backends.fa4.schedule`); dense ones through its dense kernels. All blocks are in the library's "full"
lists, except text columns where samples have padding: those are in its "masked" lists, with a mask function that reads
each sample's length. Where masks differ by head, each head has lists of its own, which are made when a layer runs and
leave with the one after the next: those of all layers would be tens of gigabytes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from radial.backends.base import AttentionCall, Layout
from radial.backends.imports import import_problem
from radial.backends.lists import Lists, block_lists, masked_counts
from radial.backends.op import Kept, KernelBackend
from radial.head_layouts import HeadLayout


class Fa4(KernelBackend):
    """Forward and backward on compute capability 9; bf16 and fp16, head dims 64 and 128, blocks of 128."""

    name = "fa4"
    gives_lse = True

    def why_not(self, call: AttentionCall) -> str | None:
        if call.device.type != "cuda":
            return f"it needs a CUDA GPU, q is on {call.device.type}"
        capability = call.capability
        if capability[0] != 9:
            return f"its schedule is for Hopper (compute capability 9.0), this GPU has {capability[0]}.{capability[1]}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"q, k and v are {call.dtype}, its kernels take bfloat16 and float16"
        if call.head_dim not in (64, 128):
            return f"head_dim is {call.head_dim}, expected 64 or 128"
        # its dense kernels have no lists, but none of them masks text
        if call.layout.block != 128 and (call.masks_text or not call.layout.is_dense):
            return f"the layout's blocks are {call.layout.block} tokens, its tiles 128"
        return None if call.planned_for else import_problem("flash-attn-4", "radial.backends.fa4.hopper")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        from radial.backends.fa4 import hopper

        q, k, v = (_aligned(t) for t in (q, k, v))
        if layout.is_dense and text_lengths is None:
            return hopper.dense_forward(q, k, v, scale)
        lists, valid = _lists(layout, text_lengths, q.device, backward=False)
        return hopper.forward(q, k, v, lists, valid, scale)

    def backward(self, grad: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (kept.q, kept.k, kept.v))
        _gradients(grad, kept, (dq, dk, dv))
        return dq, dk, dv

    def backward_into(self, grad: Tensor, kept: Kept) -> None:
        q, k, v = own = (_aligned(kept.q), _aligned(kept.k), _aligned(kept.v))
        _gradients(grad, kept._replace(q=q, k=k, v=v), own)
        for x, gradient in zip((kept.q, kept.k, kept.v), own, strict=True):
            if gradient is not x:
                x.copy_(gradient)


def _gradients(grad: Tensor, kept: Kept, into: tuple[Tensor, Tensor, Tensor]) -> None:
    from radial.backends.fa4 import hopper

    out, lse, layout, text_lengths, scale = kept[3:]
    grad, q, k, v = (_aligned(t) for t in (grad, kept.q, kept.k, kept.v))
    if layout.is_dense and text_lengths is None:
        hopper.dense_backward(grad, q, k, v, out, lse, scale, into)
    else:
        lists, valid = _lists(layout, text_lengths, q.device, backward=True)
        hopper.backward(grad, q, k, v, out, lse, lists, valid, scale, into)


def _aligned(x: Tensor) -> Tensor:
    """``x`` as the kernels' bulk copies read it: head_dim contiguous, everything else in steps of 16 bytes."""
    fits = x.stride(-1) == 1 and all(s and s % 8 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if fits else x.contiguous()


@lru_cache(maxsize=2)
def _head_lists(layout: HeadLayout, backward: bool, masks: bool, device: torch.device) -> Lists:
    return block_lists(layout, backward=backward, masks=masks, scheduled=True, device=device)


def _lists(
    layout: Layout, text_lengths: Tensor | None, device: torch.device, *, backward: bool
) -> tuple[Lists, Tensor | None]:
    """The lists of one direction, and each sample's valid keys where the text is masked."""
    masks = text_lengths is not None
    if isinstance(layout, HeadLayout):
        lists = _head_lists(layout, backward, masks, device)
    else:
        lists = layout.derived(
            ("fa4", backward, masks), lambda: block_lists(layout, backward=backward, masks=masks, scheduled=True)
        )
    if text_lengths is None:
        return lists, None
    valid = layout.grid.video_tokens + text_lengths.int()
    return lists._replace(masked_count=masked_counts(layout, valid, backward=backward)), valid
