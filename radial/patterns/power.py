"""PowerAttention: distances that are powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.base import Pattern, block_ranges, check_positive, frames_to_blocks


@dataclass(frozen=True)
class Power(Pattern):
    """PowerAttention (arXiv 2503.03588): a window, a sink, and the blocks at power-of-two distances.

    Query block i keeps key block j iff |i - j| is below the window, or a power of two, or j = 0. With d layers a block
    is reached from 2^d others. The paper's models look back only; a video's tokens look both ways.

    Args:
        reach: the window in frames to each side: max(1, floor(reach s / B)) blocks.

    Raises:
        RadialError: a reach that is not a positive number.
    """

    reach: float = 1.0
    name: ClassVar[str] = "power"
    parameter: ClassVar[str | None] = "reach"

    def __post_init__(self) -> None:
        check_positive(self.name, "reach", self.reach)

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        side = grid.video_tokens // block
        half = frames_to_blocks(self.reach, grid, block)
        steps = [2**power for power in range(side.bit_length())]
        row = torch.arange(side)
        # the window, the sink, and each distance in both directions
        starts = [row - half + 1, torch.zeros_like(row), *(row + sign * step for step in steps for sign in (-1, 1))]
        stops = [row + half, *(start + 1 for start in starts[1:])]
        return block_ranges(row.repeat(len(starts)), torch.cat(starts), torch.cat(stops), side)

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        return 1 / grid.tokens_per_frame, float(grid.frames)
