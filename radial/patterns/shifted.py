"""LongLoRA's shifted groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from radial.bands import repeat_each
from radial.grid import VideoGrid
from radial.patterns.base import Pattern, check_positive


@dataclass(frozen=True)
class ShiftedGroups(Pattern):
    """Shifted sparse attention (S2-Attn of LongLoRA, arXiv 2309.12307).

    The sequence is cut into groups, and tokens see their own group. In the second half of the heads the sequence is
    first rolled by half a group, cyclically as in the paper, so that groups exchange information. Groups are of whole
    blocks here: G = max(1, round(reach x blocks)), and the last one holds what is left.

    Args:
        reach: a group as a share of the sequence; the paper's quarter by default.
        rolled: the mask of a head of the second half.

    Raises:
        RadialError: a reach that is not a positive number.
    """

    reach: float = 0.25
    rolled: bool = False
    name: ClassVar[str] = "shifted"
    parameter: ClassVar[str | None] = "reach"

    def __post_init__(self) -> None:
        check_positive(self.name, "reach", self.reach)

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        side = grid.video_tokens // block
        size = max(1, round(min(self.reach, 1.0) * side))
        shift = size // 2 if self.rolled else 0
        row = torch.arange(side)
        start = (row - shift) % side // size * size
        row, start, within = repeat_each((start + size).clamp(max=side) - start, row, start)
        return (row * side + (start + within + shift) % side).sort().values

    @property
    def by_head(self) -> bool:
        return True

    def of_head(self, layer: int, head: int, heads: int) -> Pattern:
        return replace(self, rolled=2 * head >= heads > 1)

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        return 1 / grid.video_tokens, 1.0
