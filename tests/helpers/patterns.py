"""Patterns of the tests' own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from radial import Fitted, HeadMasks, Pattern, VideoGrid
from radial.patterns.head_masks import About, packed


@dataclass(frozen=True)
class ByHead(Pattern):
    """A diagonal, and every n-th block beside it, n by head and layer; two heads in a row share a mask.

    Args:
        tiled: its blocks are of tokens in reverse order.
        step: n.
    """

    tiled: bool = False
    step: int = 2
    name: ClassVar[str] = "by_head"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        side = grid.video_tokens // block
        row, column = torch.arange(side)[:, None], torch.arange(side)
        return ((row == column) | ((row + 2 * column) % self.step == 0)).flatten().nonzero().flatten()

    def token_order(self, grid: VideoGrid, block: int) -> Tensor | None:
        return torch.arange(grid.video_tokens).flip(0) if self.tiled else None

    @property
    def by_head(self) -> bool:
        return True

    def of_head(self, layer: int, head: int, heads: int) -> Pattern:
        return replace(self, step=2 + head // 2 + 3 * layer)


def fitted(
    grid: VideoGrid,
    block: int,
    *,
    layers: tuple[int, ...] = (0, 1),
    heads: int = 4,
    rate: float = 0.2,
    seed: int = 0,
    bits: float = 0.2,
    order: str = "raster",
    rows: int = 1,
) -> Fitted:
    """A fitted pattern with random rules, of which ``bits`` are set."""
    about = About(order, block, grid.frames, grid.height, grid.width, layers, 0.3, 0.5, rate, seed, rows=rows)
    generator = torch.Generator().manual_seed(seed)
    rules = torch.rand(len(layers), heads, about.entries, generator=generator) < bits
    return Fitted(HeadMasks(packed(rules), about, hashlib.sha256(repr((about, heads, bits)).encode()).hexdigest()))
