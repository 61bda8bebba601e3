"""Sliding tile attention: windows of three-dimensional tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.bands import repeat_each
from radial.grid import VideoGrid
from radial.patterns.base import Pattern, block_ranges, check_positive


@dataclass(frozen=True)
class SlidingTile(Pattern):
    """Sliding tile attention (STA, arXiv 2502.04507).

    The clip is cut into tiles, and tokens are ordered tile by tile. A query tile sees the key tiles of a window of
    2 r + 1 tiles along each axis around it; at the clip's border the window stays inside, so that every tile sees
    equally many (the public code's clamped centre). No sink.

    A tile has as many tokens as a block (2 x 8 x 8 for 128), where the paper's has 6 x 8 x 8. Tiles at the end of an
    axis are cut where it does not divide; blocks no longer match tiles there, and a block is kept when it holds at
    least one pair of the window.

    Args:
        reach: the window as a share of each axis, at most 1: r = floor(reach x tiles / 2).

    Raises:
        RadialError: a reach that is not a positive number.
    """

    reach: float = 0.5
    name: ClassVar[str] = "sliding_tile"
    parameter: ClassVar[str | None] = "reach"

    def __post_init__(self) -> None:
        check_positive(self.name, "reach", self.reach)

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        tile = tile_shape(block)
        side = grid.video_tokens // block
        place = _tile_of_tokens(grid, tile)
        tiles = _tile_counts(grid, tile)
        sizes = torch.bincount(place, minlength=tiles[0] * tiles[1] * tiles[2])
        ends = sizes.cumsum(0)
        # one entry a (query block, tile that it holds tokens of)
        row = torch.arange(side)
        first = torch.searchsorted(ends, row * block, right=True)
        last = torch.searchsorted(ends, (row + 1) * block - 1, right=True)
        row, query, within = repeat_each(last - first + 1, row, first)
        query = query + within
        # the window is a stretch of tiles along the width for each of its (time, height) pairs
        bounds = [
            _window(position, count, self.reach) for position, count in zip(_position(query, tiles), tiles, strict=True)
        ]
        (t_low, t_high), (h_low, h_high), (w_low, w_high) = bounds
        row, t_low, h_low, h_high, w_low, w_high, t = repeat_each(
            t_high - t_low + 1, row, t_low, h_low, h_high, w_low, w_high
        )
        line = (t_low + t) * tiles[1]
        row, line, h_low, w_low, w_high, h = repeat_each(h_high - h_low + 1, row, line, h_low, w_low, w_high)
        line = (line + h_low + h) * tiles[2]
        start, stop = (ends - sizes)[line + w_low], ends[line + w_high]
        return block_ranges(row, start // block, (stop - 1) // block + 1, side)

    def token_order(self, grid: VideoGrid, block: int) -> Tensor | None:
        # within a tile a stable sort leaves the raster order
        return _tile_of_tokens(grid, tile_shape(block)).sort(stable=True).indices

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        return 1 / (grid.frames + grid.height + grid.width), 1.0


def tile_shape(block: int) -> tuple[int, int, int]:
    """Frames, height and width of a tile of ``block`` tokens, a power of two of at least 16: flat, and as square."""
    width = 8 if block >= 32 else 4
    height = min(8, block // width)
    return block // (height * width), height, width


def _tile_counts(grid: VideoGrid, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Tiles along each axis."""
    return -(-grid.frames // tile[0]), -(-grid.height // tile[1]), -(-grid.width // tile[2])


def _tile_of_tokens(grid: VideoGrid, tile: tuple[int, int, int]) -> Tensor:
    """(video tokens,) int64: the tile of each token in raster order."""
    _, high, wide = _tile_counts(grid, tile)
    t, h, w = (torch.arange(n) // step for n, step in zip((grid.frames, grid.height, grid.width), tile, strict=True))
    return ((t[:, None, None] * high + h[:, None]) * wide + w).flatten()


def _position(index: Tensor, tiles: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Where a tile lies along each axis."""
    return index // (tiles[1] * tiles[2]), index // tiles[2] % tiles[1], index % tiles[2]


def _window(position: Tensor, count: int, reach: float) -> tuple[Tensor, Tensor]:
    """The first and the last tile along an axis of ``count`` tiles that each position sees."""
    half = int(min(reach, 1.0) * count / 2)
    if 2 * half + 1 >= count:
        return torch.zeros_like(position), torch.full_like(position, count - 1)
    centre = position.clamp(half, count - 1 - half)
    return centre - half, centre + half
