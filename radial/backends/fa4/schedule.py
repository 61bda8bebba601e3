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

What it brings, and what else was tried. One H200, torch 2.11, CUDA 13, flash-attn-4 4.0.0b36, released mask, Wan at 4x,
8 heads, by `radial.bench`; share of ideal against flash-attn-4's dense kernels, forward / backward:

=============================================  =================================================================
its sparse kernels, plain order                0.87 / 0.86
whole rows and columns issued first            0.92 / 0.89; predicted 0.93 / 0.93, from one whole row alone at the end.
                                               Device memory is at 31 % / 35 % of its rate, L2 hits are 61 % / 70 %
                                               (dense: 3 % / 1 %, and 94 % / 99 %)
... in patches of 3 x 14 tiles                 0.87 / 0.92
... in step, not in patches                    0.96 / 0.94; reads of device memory in the forward fell by 60 %, a
                                               simulation of the cache had said 42 %
... both, as here                              0.97 / 0.94; on wan_2x 1.00 / 0.93, hunyuan_4x (4 heads) 0.97 / 0.94
=============================================  =================================================================

With 40 heads (24 for Hunyuan and Mochi) the forward reaches 0.96 to 0.97 from wan_2x on, forward and backward
together 0.95 to 0.96: more heads hide what is left of the tiles' uneven ends.

Tried and left: whole columns in step too (backward 9 % slower: they start together, and spreading them makes 28 streams
of query blocks out of one), whole columns spread over the order (2 % slower), random starts (10 % slower and more),
lists that start at their diagonal (4 % slower), inputs laid out (batch, heads, tokens, head_dim) (no difference).

What remains is the backward's step of 64 query rows, since 128-token blocks do not divide into the dense kernel's 80: K
and V are read from shared memory as often for fewer rows. The library's dense backward takes 5.8 % longer in steps of
64 without pauses (371.7 against 351.2 ms, wan_2x, 8 heads), 1.8 % under the profiler (88.1 against 86.6 ms, wan_1x):
clocks follow the power that a kernel draws. Steps of 80 rows would cut blocks: they cover 1.06 (wan_2x), 1.08 (wan_4x)
and 1.10 times (hunyuan_4x) the surviving pairs, as much as they save or more. Steps of 128 rows do not fit: the sums of
dk and dv take 128 of a thread's 240 registers, and scores and their gradients would take as many again.

The hardware's counters, wan_1x, 8 heads, per cent of their peaks (ncu, kernel by kernel; clocks may go to 1.98 GHz):

==============================  =========  =============  ========  =========  =============
kernel                          tensor     shared memory  L2 hits   memory     GHz (power)
==============================  =========  =============  ========  =========  =============
backward, dense, 80 rows        79         80             98.8      1          1.58
backward, dense, 64 rows        77         82             99.1      1          1.61
backward, released mask         72         78             91.9      9          1.69
forward, dense                  87         56             98.0      2          1.61
forward, released mask          84         54             95.4      3          1.62
==============================  =========  =============  ========  =========  =============

Short clips with few heads have too few tiles for all of it to show.
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
