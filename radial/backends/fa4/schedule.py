"""In which order a GPU works through a layout: the order of the tiles, and where in its list each tile starts.

A tile is a query block with its list of key blocks (forward) or a key block with its list of query blocks (backward).
As many tiles as the GPU has multiprocessors run at once, and what one loads the others should find in the L2 cache. On
one H200 the released mask of Wan at 4x, 291,600 tokens, misses in the plain order so often that device memory works at
a third of its rate, which costs bandwidth, latency and, on a GPU at its power limit, clock. Three things help:

* *Long lists first.* The last row and column of blocks and the sink's columns are whole, six times as long as the
  others. Issued last, one of them runs alone at the end.
* *Patches.* Tiles are issued in patches of some blocks of a frame by some neighbouring frames, about as many as run
  at once. Their windows overlap more than those of whole frames.
* *In step.* Tiles start one after another, a multiprocessor at a time. Each starts as far along its list, walked as a
  ring, as those already running have come, so that all walk through the video together. Whole lists start at their
  beginning: they start together, and walk in step by themselves.

What was tried, with figures, is in the notes of `radial.bench`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from radial.grid import VideoGrid

_PATCH_HEIGHT = 7  # blocks of one frame in a patch
_PATCH_FILL = 0.85  # tiles in a patch, for each multiprocessor
# Tiles that start while one walks its list, for each multiprocessor. In the backward the sink's columns occupy some of
# the multiprocessors for longer.
_RING_FILL = {"forward": 1.0, "backward": 1.15}


@dataclass(frozen=True)
class Schedule:
    """The order of the tiles and their starting points.

    Attributes:
        order: (blocks,) int64, the tile that is issued i-th.
        start: (blocks,) float64 in [0, 1), by tile: the share of its list that it leaves for the end.
    """

    order: Tensor
    start: Tensor

    @classmethod
    def of(cls, counts: Tensor, grid: VideoGrid, block: int, *, multiprocessors: int, direction: str) -> Schedule:
        """The schedule of tiles with lists of ``counts`` (blocks,) entries; direction is forward or backward."""
        blocks = len(counts)
        tile = torch.arange(blocks)
        per_frame = grid.tokens_per_frame / block
        frame = (tile / per_frame).long()
        bands = max(1, round(per_frame / _PATCH_HEIGHT))
        band = ((tile - frame * per_frame) * bands / per_frame).long()
        depth = max(1, round(_PATCH_FILL * multiprocessors * bands / per_frame))
        slab = frame // depth
        # every other slab the other way round, so that neighbouring patches touch
        band = torch.where(slab % 2 == 1, bands - 1 - band, band)
        counts = counts.cpu()
        long = counts > 2 * counts.median()
        key = torch.where(long, blocks - counts, ((slab + 1) * bands + band) * blocks + blocks)
        order = key.argsort(stable=True)
        position = torch.empty(blocks, dtype=torch.float64)
        position[order] = torch.arange(blocks, dtype=torch.float64)
        start = (position / (_RING_FILL[direction] * multiprocessors)) % 1
        return cls(order, torch.where(long, 0.0, start))
