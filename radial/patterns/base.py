"""What a pattern is: a static choice of block pairs on a video's token grid, without any knowledge of kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from radial.bands import repeat_each
from radial.errors import RadialError
from radial.grid import VideoGrid


class Pattern(ABC):
    """A static choice of block pairs. Subclasses are frozen, hashable dataclasses, since layouts are cached by them.

    A pattern answers for the video part of a grid; `radial.layout` adds text and partial blocks.
    """

    name: ClassVar[str]
    """What ``attention.pattern`` and `make_pattern` call it."""
    parameter: ClassVar[str | None] = None
    """The number among its fields that more blocks follow when it grows; None where it has none."""

    @abstractmethod
    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        """Kept pairs among the ``grid.video_tokens // block`` complete blocks of the video.

        Of a pattern that differs by head these are the first head's of the first layer, or those of a mask that has as
        many as its heads have in the mean.

        Returns:
            int64 vector of ``row * complete_blocks + column``, ascending, without repeats.
        """

    def token_order(self, grid: VideoGrid, block: int) -> Tensor | None:
        """Permutation of the video tokens that the pattern's blocks assume, or None for raster order.

        Entry ``p`` names the raster token at position ``p``, int64. `radial.attention_over` applies it to q, k and v,
        whose positions are in them by then, and undoes it in the output; models have their tokens in this order in all
        layers (`train.attention.step`).
        """
        return None

    @property
    def by_head(self) -> bool:
        """Whether heads or layers have masks of their own, which `of_head` gives."""
        return False

    def of_head(self, layer: int, head: int, heads: int) -> Pattern:
        """The pattern of one head of ``heads`` in one layer, the same for all heads. Equal masks are equal objects."""
        return self

    def head_blocks(
        self, layer: int, own: range, heads: int, grid: VideoGrid, block: int, device: torch.device | None = None
    ) -> Tensor | None:
        """The masks of some heads of a layer at once, for patterns whose lists of all layers are too large to keep.

        Args:
            layer: its number.
            own: the heads, of ``heads``.
            grid, block: as for `video_blocks`.
            device: where the result is worked out; None: the CPU.

        Returns:
            (own, complete blocks, complete blocks) bool: those of `of_head`. None: ask that.
        """
        return None

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        """The values of `parameter`, above zero, between which all shares of a grid lie that the pattern can have."""
        raise NotImplementedError(f"pattern {self.name} has no parameter")


def check_positive(pattern: str, field: str, value: float) -> None:
    """Raises where a pattern's number is not a positive finite one.

    Raises:
        RadialError: the field, what it is and what was expected.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise RadialError(f"{field} of pattern {pattern} is {value!r}, expected a positive number")


def block_ranges(row: Tensor, start: Tensor, stop: Tensor, side: int) -> Tensor:
    """Each row's blocks from ``start`` up to before ``stop``, as `Pattern.video_blocks` returns them.

    Args:
        row, start, stop: int64 vectors of one length, a row may come several times; rows and columns outside of
            ``side`` are left out, and so is what stops before it starts.
        side: blocks of the grid along one side.
    """
    start, stop = start.clamp(0, side), stop.clamp(0, side)
    row, start, column = repeat_each((stop - start).clamp(min=0), row, start)
    keys = row * side + start + column
    return torch.unique(keys[row < side])


def window_blocks(side: int, half: int, sink: int = 0) -> Tensor:
    """A band of blocks along the diagonal and whole key blocks at the start, as `Pattern.video_blocks` returns them.

    Args:
        side: blocks of the grid along one side.
        half: a pair is in the band when its distance is below this.
        sink: so many key blocks are kept for every query block.
    """
    row = torch.arange(side)
    zero = torch.zeros_like(row)
    return block_ranges(
        torch.cat([row, row]),
        torch.cat([zero, row - half + 1]),
        torch.cat([zero + sink, row + half]),
        side,
    )


def frames_to_blocks(frames: float, grid: VideoGrid, block: int) -> int:
    """Whole blocks of so many frames, at least one."""
    return max(1, int(min(frames, grid.frames) * grid.tokens_per_frame // block))
