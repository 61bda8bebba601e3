"""Windows along the sequence: a plain one, and the two kinds of head of Sparse VideoGen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.base import Pattern, check_positive, frames_to_blocks, window_blocks


@dataclass(frozen=True)
class _Window(Pattern):
    """What the windows share: with B the block size and s the tokens of a frame, blocks i and j see each other when
    |i - j| < max(1, floor(reach s / B)).

    Args:
        reach: frames to each side, not necessarily whole.

    Raises:
        RadialError: a reach that is not a positive number.
    """

    reach: float = 2.0
    parameter: ClassVar[str | None] = "reach"

    def __post_init__(self) -> None:
        check_positive(self.name, "reach", self.reach)

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        return 1 / grid.tokens_per_frame, float(grid.frames)


@dataclass(frozen=True)
class Local(_Window):
    """A sliding window over the sequence and nothing else (Longformer's, arXiv 2004.05150)."""

    name: ClassVar[str] = "local"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        return window_blocks(grid.video_tokens // block, frames_to_blocks(self.reach, grid, block))


@dataclass(frozen=True)
class Spatial(_Window):
    """Sparse VideoGen's spatial heads (arXiv 2502.01776): a window of whole neighbouring frames, and a sink.

    As the public code draws it for Wan: the window of `_Window` with 2 frames to each side, and all blocks that hold
    tokens of the first frame as keys of every query. The tokens are in raster order.
    """

    name: ClassVar[str] = "spatial"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        sink = -(-grid.tokens_per_frame // block)
        return window_blocks(grid.video_tokens // block, frames_to_blocks(self.reach, grid, block), sink)


@dataclass(frozen=True)
class Temporal(Spatial):
    """Sparse VideoGen's temporal heads (arXiv 2502.01776): the same places in all frames.

    The tokens are ordered place by place, each place through all frames, and then have the mask of `Spatial`. The
    sink is therefore of the first s tokens in that order, the first places of the clip, as in the public code.
    """

    name: ClassVar[str] = "temporal"

    def token_order(self, grid: VideoGrid, block: int) -> Tensor | None:
        return torch.arange(grid.video_tokens).view(grid.frames, grid.tokens_per_frame).T.flatten()
