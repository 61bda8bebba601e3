"""Random blocks: the floor that every choice of blocks has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.base import Pattern, check_positive
from radial.patterns.released import Released


@dataclass(frozen=True)
class Random(Pattern):
    """Block pairs drawn uniformly, the same for the same grid and block size.

    Args:
        like: the released mask whose number of blocks it takes.
        seed: draws the blocks.
        reach: instead, the share of the video's block pairs that is drawn, at most 1.
        per_head: a draw for each head of each layer; else one draw for all of them.

    Raises:
        RadialError: a reach that is not a positive number.
    """

    like: Released = field(default_factory=Released)
    seed: int = 0
    reach: float | None = None
    per_head: bool = False
    name: ClassVar[str] = "random"
    parameter: ClassVar[str | None] = "reach"

    def __post_init__(self) -> None:
        if self.reach is not None:
            check_positive(self.name, "reach", self.reach)

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        pairs = (grid.video_tokens // block) ** 2
        if self.reach is None:
            count = len(self.like.video_blocks(grid, block))
        else:
            count = round(min(self.reach, 1.0) * pairs)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(pairs, generator=generator)[:count].sort().values

    @property
    def by_head(self) -> bool:
        return self.per_head

    def of_head(self, layer: int, head: int, heads: int) -> Pattern:
        if not self.per_head:
            return self
        # torch's generator takes 32 bits of a seed; the upper half is for heads, so that no small seed draws the same
        seed = 2**31 + ((self.seed * 1_000_003 + layer) * 1_009 + head) % 2**31
        return replace(self, seed=seed, per_head=False)

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        return 1 / grid.video_tokens, 1.0
