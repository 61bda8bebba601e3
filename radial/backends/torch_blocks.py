"""Block-sparse attention in plain torch operations: runs everywhere, and is the oracle of the faster backends.

For each query block, its key and value blocks are gathered, and attention over them is an ordinary small one: torch's
scaled_dot_product_attention in the forward. The backward computes the probabilities again, one row of blocks at a time:

    P = softmax(scale Q K^T)     dP = dO V^T            dS = P * (dP - rowsum(P * dP))
    dV += P^T dO                 dQ = scale dS K        dK += scale dS^T Q

Where masks differ by head, the heads of each mask are computed together, one mask after another.

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

from radial.backends.base import AttentionCall, Layout
from radial.backends.op import Kept, KernelBackend
from radial.head_layouts import HeadLayout


class TorchBlocks(KernelBackend):
    """The reference backend; differentiable, any device and floating dtype."""

    name = "torch"
    gives_lse = False

    def why_not(self, call: AttentionCall) -> str | None:
        if not call.dtype.is_floating_point:
            return f"q, k and v are {call.dtype}, expected a floating-point dtype"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, text_lengths: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if isinstance(layout, HeadLayout):
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            for heads, offsets, columns in _masks_of(layout, q.device):
                own = [x[:, :, heads] for x in (q, k, v)]
                out[:, :, heads] = _forward(own[0], own[1], own[2], layout, offsets, columns, text_lengths, scale)
        else:
            out = _forward(q, k, v, layout, layout.row_offsets, layout.columns, text_lengths, scale)
        return out, q.new_empty(0, dtype=torch.float32)

    def backward(self, grad: Tensor, kept: Kept) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _, layout, text_lengths, scale = kept
        if isinstance(layout, HeadLayout):
            gradients = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
            for heads, offsets, columns in _masks_of(layout, q.device):
                own = [x[:, :, heads] for x in (grad, q, k, v)]
                found = _backward(own[0], own[1], own[2], own[3], layout, offsets, columns, text_lengths, scale)
                for whole, part in zip(gradients, found, strict=True):
                    whole[:, :, heads] = part
            return gradients[0], gradients[1], gradients[2]
        return _backward(grad, q, k, v, layout, layout.row_offsets, layout.columns, text_lengths, scale)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    row_offsets: Tensor,
    columns: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """The output of heads of one mask, whose lists are ``row_offsets`` and ``columns``."""
    q_NTBD, k_NTBD, v_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v))
    valid_N = _valid_keys(layout, text_lengths, q)
    out_NTBD = torch.empty_like(q_NTBD)
    for i, keys in _rows_of(row_offsets, columns):
        k_NKD, v_NKD = k_NTBD[:, keys].flatten(1, 2), v_NTBD[:, keys].flatten(1, 2)
        padding = _padding(keys, layout, valid_N)
        keep = None if padding is None else ~padding[None, :, None]
        out_NTBD[:, i] = F.scaled_dot_product_attention(
            q_NTBD[None, :, i], k_NKD[None], v_NKD[None], attn_mask=keep, scale=scale
        )[0]
    return _from_blocks(out_NTBD, q)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    row_offsets: Tensor,
    columns: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of heads of one mask."""
    valid_N = _valid_keys(layout, text_lengths, q)
    work, low = torch.float64 if q.dtype == torch.float64 else torch.float32, q.dtype
    q_NTBD, k_NTBD, v_NTBD, grad_NTBD = (_to_blocks(t, layout.block) for t in (q, k, v, grad))
    q_work, k_work, v_work, grad_work = (t.to(work) for t in (q_NTBD, k_NTBD, v_NTBD, grad_NTBD))
    dq = torch.empty_like(q_NTBD)
    dk, dv = torch.zeros_like(k_work), torch.zeros_like(v_work)
    for i, keys in _rows_of(row_offsets, columns):
        k_NKD, v_NKD = k_work[:, keys].flatten(1, 2), v_work[:, keys].flatten(1, 2)
        p = (q_work[:, i] @ k_NKD.transpose(1, 2)).mul_(scale)
        padding = _padding(keys, layout, valid_N)
        if padding is not None:
            p.masked_fill_(padding[:, None], float("-inf"))
        p = p.softmax(-1)
        dp = grad_work[:, i] @ v_NKD.transpose(1, 2)
        # P * (dP - rowsum(P * dP)) in one pass
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, work).to(low)
        shape = (len(p), len(keys), layout.block, -1)
        dv.index_add_(1, keys, (p.to(low).transpose(1, 2) @ grad_NTBD[:, i]).view(shape).to(work))
        dk.index_add_(1, keys, (ds.transpose(1, 2) @ q_NTBD[:, i]).view(shape).to(work))
        dq[:, i] = scale * (ds @ k_NTBD[:, keys].flatten(1, 2))
    return _from_blocks(dq, q), _from_blocks(dk.mul_(scale), k), _from_blocks(dv, v)


def _masks_of(layout: HeadLayout, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(heads, row offsets, columns) for every mask of a layer."""
    masks = layout.masks()
    for mask in range(len(masks.row_offsets)):
        row_offsets, columns = masks.rows(mask)
        yield (masks.of_head == mask).nonzero().flatten().to(device), row_offsets, columns.to(device)


def _rows_of(row_offsets: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(query block, its key blocks) for every query block."""
    offsets = row_offsets.tolist()
    columns = columns.long()
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        yield i, columns[start:stop]


def _valid_keys(layout: Layout, text_lengths: Tensor | None, q: Tensor) -> Tensor:
    """(N,) number of keys that count: all but padding text and the padding of the last block."""
    batch, _, heads, _ = q.shape
    if text_lengths is None:
        return torch.full((batch * heads,), layout.grid.tokens, device=q.device)
    return (layout.grid.video_tokens + text_lengths.long()).repeat_interleave(heads)


def _padding(columns: Tensor, layout: Layout, valid_N: Tensor) -> Tensor | None:
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
