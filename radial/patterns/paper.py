"""Eq. 4 of the Radial Attention paper (arXiv 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.bands import Bands, surviving_blocks
from radial.grid import VideoGrid
from radial.patterns.base import Pattern


@dataclass(frozen=True)
class Paper(Pattern):
    """Eq. 4 of the paper: with r = floor(log2 max(d, 1)), token (i, k) attends to (j, l) iff

    2^r <= s and |k - l| + 1 <= s / 2^r,  or  d mod ceil(2^r / s) = 0 and k = l,  or  j = 0.

    Kernels work on blocks, so a block is kept when it holds at least one such pair: nothing the paper keeps is lost.
    """

    name: ClassVar[str] = "paper"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        s, frames = grid.tokens_per_frame, grid.frames
        parts: list[Bands] = []
        for distance in range(frames):
            reach = 1 << (max(distance, 1).bit_length() - 1)
            if reach <= s:
                parts.append(Bands.at_distance(frames, distance, s // reach - 1))
            elif distance % -(-reach // s) == 0:
                parts.append(Bands.at_distance(frames, distance, 0))
        every = torch.arange(frames)
        parts.append(Bands(every, torch.zeros_like(every), torch.full_like(every, s)))
        return surviving_blocks(Bands.join(parts), s, block, grid.video_tokens // block, strict=False)
