"""Block-sparse attention in plain torch operations: runs everywhere, and is the oracle of the faster backends.

For each query block, its key and value blocks are gathered, and attention over them is an ordinary small one: torch's
scaled_dot_product_attention in the forward. The backward computes the probabilities again, one row of blocks at a time:

    P = softmax(scale Q K^T)     dP = dO V^T            dS = P * (dP - rowsum(P * dP))
    dV += P^T dO                 dQ = scale dS K        dK += scale dS^T Q

Time follows the surviving blocks; memory is the inputs, the outputs and one row of blocks. Precision for 16-bit inputs
is a flash kernel's: scores, softmax, dO V^T and all sums over blocks in float32; products whose result leaves in 16
bits anyway (P V, P^T dO, dS K, dS^T Q) take 16-bit operands. float32 and float64 inputs stay in their precision.

Shapes: N = batch x heads, T = blocks along the sequence, B = block size, D = head dim, M = key blocks of one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from radial.backends.base import AttentionCall
from radial.backends.op import KernelBackend
from radial.layout import BlockLayout


class TorchBlocks(KernelBackend):
    """The reference backend; differentiable, any device and floating dtype."""

    name = "torch"
    gives_lse = False

    def why_not(self, call: AttentionCall) -> str | None:
        if not call.dtype.is_floating_point:
            return f"q, k and v are {call.dtype}, expected a floating-point dtype"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, text_lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        q_NTBD, k_NTBD, v_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v))
        valid_N = _valid_keys(layout, text_lengths, q)
        out_NTBD = torch.empty_like(q_NTBD)
        for i, columns in _rows_of(layout):
            k_NKD, v_NKD = k_NTBD[:, columns].flatten(1, 2), v_NTBD[:, columns].flatten(1, 2)
            padding = _padding(columns, layout, valid_N)
            keep = None if padding is None else ~padding[None, :, None]
            out_NTBD[:, i] = F.scaled_dot_product_attention(
                q_NTBD[None, :, i], k_NKD[None], v_NKD[None], attn_mask=keep, scale=scale
            )[0]
        return _from_blocks(out_NTBD, q), q.new_empty(0, dtype=torch.float32)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        layout: BlockLayout,
        text_lengths: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid_N = _valid_keys(layout, text_lengths, q)
        work, low = torch.float64 if q.dtype == torch.float64 else torch.float32, q.dtype
        q_NTBD, k_NTBD, v_NTBD, grad_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v, grad))
        q_work, k_work, v_work, grad_work = (t.to(work) for t in (q_NTBD, k_NTBD, v_NTBD, grad_NTBD))
        dq = torch.empty_like(q_NTBD)
        dk, dv = torch.zeros_like(k_work), torch.zeros_like(v_work)
        for i, columns in _rows_of(layout):
            k_NKD, v_NKD = k_work[:, columns].flatten(1, 2), v_work[:, columns].flatten(1, 2)
            p = (q_work[:, i] @ k_NKD.transpose(1, 2)).mul_(scale)
            padding = _padding(columns, layout, valid_N)
            if padding is not None:
                p.masked_fill_(padding[:, None], float("-inf"))
            p = p.softmax(-1)
            dp = grad_work[:, i] @ v_NKD.transpose(1, 2)
            # P * (dP - rowsum(P * dP)) in one pass
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, work).to(low)
            shape = (len(p), len(columns), layout.block, -1)
            dv.index_add_(1, columns, (p.to(low).transpose(1, 2) @ grad_NTBD[:, i]).view(shape).to(work))
            dk.index_add_(1, columns, (ds.transpose(1, 2) @ q_NTBD[:, i]).view(shape).to(work))
            dq[:, i] = scale * (ds @ k_NTBD[:, columns].flatten(1, 2))
        return _from_blocks(dq, q), _from_blocks(dk.mul_(scale), k), _from_blocks(dv, v)


def _rows_of(layout: BlockLayout) -> Iterator[tuple[int, Tensor]]:
    """(query block, its key blocks) for every query block."""
    offsets = layout.row_offsets.tolist()
    columns = layout.columns.long()
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        yield i, columns[start:stop]


def _valid_keys(layout: BlockLayout, text_lengths: Tensor | None, q: Tensor) -> Tensor:
    """(N,) number of keys that count: all but padding text and the padding of the last block."""
    batch, _, heads, _ = q.shape
    if text_lengths is None:
        return torch.full((batch * heads,), layout.grid.tokens, device=q.device)
    return (layout.grid.video_tokens + text_lengths.long()).repeat_interleave(heads)


def _padding(columns: Tensor, layout: BlockLayout, valid_N: Tensor) -> Tensor | None:
    """(N, M x B) which keys of a row of blocks are padding; None when it has no block after the video."""
    if int(columns[-1]) < layout.complete_blocks:
        return None
    within = torch.arange(layout.block, device=columns.device)
    return (columns[:, None] * layout.block + within).flatten() >= valid_N[:, None]


def _to_blocks(x: Tensor, block: int) -> Tensor:
    """(batch, tokens, heads, D) -> (N, T, B, D), the last block zero-padded."""
    batch, tokens, heads, dim = x.shape
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -tokens % block))
    return x.reshape(batch * heads, -1, block, dim)


def _from_blocks(x_NTBD: Tensor, like: Tensor) -> Tensor:
    """Back to the shape and dtype of ``like``, (batch, tokens, heads, D)."""
    batch, tokens, heads, dim = like.shape
    x = x_NTBD.reshape(batch, heads, -1, dim)[:, :, :tokens]
    return x.transpose(1, 2).to(like.dtype).contiguous()
