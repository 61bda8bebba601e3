"""Slow, plain re-statements of the definitions: what the fast code is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from radial import BlockLayout

if TYPE_CHECKING:
    from train.models.base import ModelAdapter  # takes seconds to import


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


def window_blocks(s: int, frames: int, block: int, reach: float, sink: bool) -> Tensor:
    """SVG's mask in the order of its head's tokens, or without the sink a plain window, block by block."""
    complete, half = s * frames // block, max(1, math.floor(min(reach, frames) * s / block))
    out = torch.zeros(complete, complete, dtype=torch.bool)
    for i in range(complete):
        for j in range(complete):
            out[i, j] = abs(i - j) < half or (sink and j * block < s)
    return out


def place_by_place(s: int, frames: int) -> list[int]:
    """The raster tokens in the order of SVG's temporal heads: a place of the frame after the other, all frames."""
    return [frame * s + place for place in range(s) for frame in range(frames)]


def power_blocks(s: int, frames: int, block: int, reach: float) -> Tensor:
    """PowerAttention in both directions, block by block."""
    complete, half = s * frames // block, max(1, math.floor(min(reach, frames) * s / block))
    powers = {2**n for n in range(32)}
    out = torch.zeros(complete, complete, dtype=torch.bool)
    for i in range(complete):
        for j in range(complete):
            out[i, j] = abs(i - j) < half or abs(i - j) in powers or j == 0
    return out


def group_blocks(complete: int, size: int, rolled: bool) -> Tensor:
    """LongLoRA's groups: the sequence of blocks, rolled by half a group or not, cut, and put back."""
    sequence = list(range(complete))
    if rolled:
        sequence = sequence[size // 2 :] + sequence[: size // 2]
    out = torch.zeros(complete, complete, dtype=torch.bool)
    for start in range(0, complete, size):
        group = sequence[start : start + size]
        for i in group:
            out[i, group] = True
    return out


def sliding_tile_tokens(
    size: tuple[int, int, int], tile: tuple[int, int, int], reach: float
) -> tuple[list[int], Tensor]:
    """STA: the raster tokens tile by tile, and which of them see each other in that order, (n, n)."""
    tiles = [-(-n // step) for n, step in zip(size, tile, strict=True)]
    halves = [math.floor(min(reach, 1.0) * count / 2) for count in tiles]

    def sees(query: int, key: int, half: int, count: int) -> bool:
        if 2 * half + 1 >= count:
            return True
        return abs(min(max(query, half), count - 1 - half) - key) <= half

    places = []
    for t in range(size[0]):
        for h in range(size[1]):
            for w in range(size[2]):
                places.append((t // tile[0], h // tile[1], w // tile[2]))
    order = sorted(range(len(places)), key=lambda token: places[token])
    kinds = sorted(set(places))
    number = torch.tensor([kinds.index(places[token]) for token in order])
    pairs = [[all(map(sees, a, b, halves, tiles)) for b in kinds] for a in kinds]
    return order, torch.tensor(pairs)[number][:, number]


def cover(tokens: Tensor, block: int) -> Tensor:
    """Blocks that hold at least one kept pair, complete blocks only."""
    complete = len(tokens) // block
    part = tokens[: complete * block, : complete * block]
    return part.view(complete, block, complete, block).any(3).any(1)


def token_mask(layout: BlockLayout) -> Tensor:
    """Which tokens see each other, in the caller's order: (tokens, tokens)."""
    n, block = layout.grid.tokens, layout.block
    mask = layout.mask().repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
    if layout.order is None:
        return mask
    out = torch.zeros_like(mask)
    out[layout.order[:, None], layout.order] = mask
    return out


def masked_softmax(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, text_lengths: Tensor | None, scale: float
) -> Tensor:
    """Attention as an ordinary softmax under the layout's token mask; q, k, v (batch, tokens, heads, dim)."""
    n = layout.grid.tokens
    mask = token_mask(layout).to(q.device).expand(len(q), 1, n, n).clone()
    if text_lengths is not None:
        for sample, length in enumerate(text_lengths.tolist()):
            mask[sample, :, :, layout.grid.video_tokens + length :] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def attend_exactly(adapter: ModelAdapter) -> list[Any]:
    """Exchanges a model's attention for the float64 oracle over the layouts that it has, of tokens in raster order.

    Returns:
        The layouts, each as it is used.
    """
    layouts: list[Any] = []

    def exact(layout: Any) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, text_lengths: Tensor | None = None) -> Tensor:
            layouts.append(layout)
            wide = [t.double() for t in (q, k, v)]
            return masked_softmax(*wide, layout, text_lengths, q.shape[-1] ** -0.5).to(v.dtype)

        return attend

    for layer in adapter.layers():
        processor = adapter.self_attention(layer).processor
        processor.attend = exact(processor.layout)
    return layouts
