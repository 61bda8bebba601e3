"""Block-sparse attention in plain torch operations: runs everywhere, and is the oracle of the faster backends.

For each query block, its key and value blocks are gathered and attention over them is an ordinary small one. The
backward computes the probabilities again, row of blocks by row of blocks:

    P = softmax(scale Q K^T)      dV += P^T dO      dS = P * (dO V^T - rowsum(dO * O))
    dQ = scale dS K               dK += scale dS^T Q

Time follows the surviving blocks; memory is the inputs, the outputs and one row of blocks. All arithmetic is in
float32 (float64 for float64 inputs), whatever the dtype of the inputs.

Shapes: N = batch x heads, T = blocks along the sequence, B = block size, D = head dim, M = key blocks of one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from radial.backends.base import AttentionCall
from radial.layout import BlockLayout


class TorchBlocks:
    """The reference backend; differentiable, any device and floating dtype."""

    name = "torch"

    def why_not(self, call: AttentionCall) -> str | None:
        if not call.dtype.is_floating_point:
            return f"q, k and v are {call.dtype}, expected a floating-point dtype"
        return None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, text_lengths: Tensor | None, scale: float
    ) -> Tensor:
        return _BlockAttention.apply(q, k, v, layout, text_lengths, scale)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        text_lengths: Tensor | None,
        scale: float,
    ) -> Tensor:
        q_NTBD, k_NTBD, v_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v))
        valid_N = _valid_keys(layout, text_lengths, q)
        out_NTBD = torch.empty_like(q_NTBD)
        for i, columns in _rows_of(layout):
            k_NKD, v_NKD = k_NTBD[:, columns].flatten(1, 2), v_NTBD[:, columns].flatten(1, 2)
            out_NTBD[:, i] = _probabilities(q_NTBD[:, i], k_NKD, columns, layout, valid_N, scale) @ v_NKD
        out = _from_blocks(out_NTBD, q)
        ctx.save_for_backward(q, k, v, out, valid_N)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, valid_N = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        q_NTBD, k_NTBD, v_NTBD, grad_NTBD, out_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v, grad, out))
        delta_NTB = (grad_NTBD * out_NTBD).sum(-1)
        dq, dk, dv = torch.empty_like(q_NTBD), torch.zeros_like(k_NTBD), torch.zeros_like(v_NTBD)
        for i, columns in _rows_of(layout):
            k_NKD, v_NKD = k_NTBD[:, columns].flatten(1, 2), v_NTBD[:, columns].flatten(1, 2)
            p = _probabilities(q_NTBD[:, i], k_NKD, columns, layout, valid_N, scale)
            shape = (p.shape[0], len(columns), layout.block, -1)
            dv.index_add_(1, columns, (p.transpose(1, 2) @ grad_NTBD[:, i]).view(shape))
            ds = p.mul_((grad_NTBD[:, i] @ v_NKD.transpose(1, 2)).sub_(delta_NTB[:, i, :, None])).mul_(scale)
            dq[:, i] = ds @ k_NKD
            dk.index_add_(1, columns, (ds.transpose(1, 2) @ q_NTBD[:, i]).view(shape))
        return _from_blocks(dq, q), _from_blocks(dk, k), _from_blocks(dv, v), None, None, None


def _rows_of(layout: BlockLayout) -> Iterator[tuple[int, Tensor]]:
    """(query block, its key blocks) for every query block."""
    offsets = layout.row_offsets.tolist()
    columns = layout.columns.long()
    for i, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        yield i, columns[start:stop]


def _valid_keys(layout: BlockLayout, text_lengths: Tensor | None, q: Tensor) -> Tensor:
    """(N,) number of keys that count: all but padding text and the padding of the last block."""
    batch, _, heads, _ = q.shape
    if text_lengths is None:
        return torch.full((batch * heads,), layout.grid.tokens, device=q.device)
    return (layout.grid.video_tokens + text_lengths.long()).repeat_interleave(heads)


def _probabilities(
    q_NBD: Tensor, k_NKD: Tensor, columns: Tensor, layout: BlockLayout, valid_N: Tensor, scale: float
) -> Tensor:
    """(N, B, M x B) softmax of the scores; zero where the key is padding, which only blocks after the video hold."""
    scores = (q_NBD @ k_NKD.transpose(1, 2)).mul_(scale)
    tail = int((columns >= layout.complete_blocks).sum())
    if tail:
        block = layout.block
        position = (columns[-tail:, None] * block + torch.arange(block, device=columns.device)).flatten()
        padding = position >= valid_N[:, None]
        scores[:, :, -tail * block :].masked_fill_(padding[:, None], float("-inf"))
    return scores.softmax(-1)


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """(batch, tokens, heads, D) -> (N, T, B, D) in the working precision, the last block zero-padded."""
    batch, tokens, heads, dim = x.shape
    work = x.dtype if x.dtype == torch.float64 else torch.float32
    x = F.pad(x.transpose(1, 2).to(work), (0, 0, 0, -tokens % block))
    return x.reshape(batch * heads, -1, block, dim)


def _from_blocks(x_NTBD: Tensor, like: Tensor) -> Tensor:
    """Back to the shape and dtype of ``like``, (batch, tokens, heads, D)."""
    batch, tokens, heads, dim = like.shape
    x = x_NTBD.reshape(batch, heads, -1, dim)[:, :, :tokens]
    return x.transpose(1, 2).to(like.dtype).contiguous()
