"""Patterns of the tests' own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from radial import Pattern, VideoGrid


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
