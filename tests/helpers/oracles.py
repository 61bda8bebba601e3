"""Slow, plain re-statements of the definitions: what the fast code is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from radial import BlockLayout


def released_blocks(s: int, frames: int, block: int, decay: float, rule: str) -> Tensor:
    """The released mask from its definition, token by token and frame pair by frame pair: (complete, complete)."""
    complete = s * frames // block
    canvas = -(-s // block)
    out = torch.zeros(complete + canvas + 1, complete + canvas + 1, dtype=torch.bool)
    power = 1
    while power <= s:
        power *= 2
    position = torch.arange(s)
    gap = (position[:, None] - position[None]).abs()
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            u = power / 2 ** d.bit_length()
            if j == 0 and rule != "hunyuan":
                pair = torch.ones(s, s, dtype=torch.bool)
            elif u < 128 and d % math.floor(128 / u) != 0:
                continue
            elif d == 1 and rule == "ports":
                pair = gap <= s // 2
            elif d <= 1:
                pair = torch.ones(s, s, dtype=torch.bool)
            else:
                pair = gap <= max(u * decay, block)
            a, b = i * s % block, j * s % block
            plane = torch.zeros(canvas * block + 2 * block, canvas * block + 2 * block, dtype=torch.bool)
            plane[a : a + s, b : b + s] = pair
            tiles = plane[: canvas * block, : canvas * block].view(canvas, block, canvas, block)
            covered_rows = tiles.sum(1)  # (canvas, canvas, block): rows of each column of each block
            any_covered = (covered_rows > 0).sum(-1)
            well_covered = (covered_rows > block / 3).sum(-1)
            survives = (any_covered > 0) & (well_covered / any_covered.clamp(min=1) > 0.6)
            x, y = i * s // block, j * s // block
            out[x : x + canvas, y : y + canvas] |= survives
    return out[:complete, :complete]


def paper_tokens(s: int, frames: int) -> Tensor:
    """Eq. 4 token by token: (n, n)."""
    index = torch.arange(s * frames)
    frame, place = index // s, index % s
    d = (frame[:, None] - frame[None]).abs()
    gap = (place[:, None] - place[None]).abs()
    r2 = 2 ** torch.log2(d.clamp(min=1).double()).floor()
    window = (r2 <= s) & (gap + 1 <= s / r2)
    diagonal = (d % torch.ceil(r2 / s) == 0) & (gap == 0)
    return window | diagonal | (frame == 0)[None]


def cover(tokens: Tensor, block: int) -> Tensor:
    """Blocks that hold at least one kept pair, complete blocks only."""
    complete = len(tokens) // block
    part = tokens[: complete * block, : complete * block]
    return part.view(complete, block, complete, block).any(3).any(1)


def masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Attention as an ordinary softmax under the layout's token mask; q, k, v (batch, tokens, heads, dim)."""
    n, block = layout.grid.tokens, layout.block
    mask = layout.mask().repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
    mask = mask.to(q.device).expand(len(q), 1, n, n).clone()
    if text_lengths is not None:
        for sample, length in enumerate(text_lengths.tolist()):
            mask[sample, :, :, layout.grid.video_tokens + length :] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
