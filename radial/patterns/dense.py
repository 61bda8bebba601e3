"""Ordinary attention, as a pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.base import Pattern


@dataclass(frozen=True)
class Dense(Pattern):
    """Every token attends to every token: the baseline, and the choice for noisy steps."""

    name: ClassVar[str] = "dense"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        return torch.arange((grid.video_tokens // block) ** 2)
