"""From frame-pair bands to blocks, in constant time a block.

Both published masks are unions of *bands*: for a query frame i and a key frame j, token k of i attends to token l of
j iff |k - l| <= w. This module turns a list of bands (i, j, w) into the B x B blocks of the global block grid that
survive, with integer arithmetic on vectors of candidate blocks, so that time and memory follow the surviving blocks
and never n^2 or f^2.

Geometry. Frame i covers tokens [i s, (i+1) s) and may start in the middle of a block. In global token coordinates a
band keeps (x, y) iff |(x - i s) - (y - j s)| <= w. For one block, rows [x0, x1] and columns [y0, y1] of the frame
pair, the number of rows that column y keeps is

    c(y) = min(x1, y + e + w) - max(x0, y + e - w) + 1        with e = (i - j) s,

concave in y, so {y : c(y) >= t} is an interval with closed-form ends. `_columns_covered` counts it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 21  # candidate blocks in flight: bounds the memory of one step at about 300 MB


@dataclass(frozen=True)
class Bands:
    """Frame pairs with the half-width of their band: int64 vectors of one length.

    ``query`` and ``key`` are frame indices, ``width`` is w >= 0 in tokens (a whole frame has w = s).
    """

    query: Tensor
    key: Tensor
    width: Tensor

    @classmethod
    def at_distance(cls, frames: int, distance: int, width: int) -> Bands:
        """All frame pairs (i, j) with |i - j| = distance, in both directions for distance > 0."""
        near = torch.arange(frames - distance)
        far = near + distance
        if distance == 0:
            query, key = near, near
        else:
            query, key = torch.cat([near, far]), torch.cat([far, near])
        return cls(query, key, torch.full_like(query, width))

    @classmethod
    def join(cls, parts: list[Bands]) -> Bands:
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("query", "key", "width")))


def repeat_each(counts: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Each vector with entry e repeated counts[e] times; the last result counts 0, 1, ... within each entry."""
    total = torch.arange(int(counts.sum()), dtype=counts.dtype)
    starts = torch.repeat_interleave(counts.cumsum(0, dtype=counts.dtype) - counts, counts)
    return (*(torch.repeat_interleave(v, counts) for v in vectors), total - starts)


def _columns_covered(least: int, x0: Tensor, x1: Tensor, y0: Tensor, y1: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Columns of [y0, y1] that keep at least ``least`` of the rows [x0, x1]; ``shift`` is e of the module text."""
    low = torch.maximum(y0, x0 - shift - w + (least - 1))
    high = torch.minimum(y1, x1 - shift + w - (least - 1))
    possible = (x1 - x0 + 1 >= least) & (2 * w + 1 >= least)
    return torch.where(possible, (high - low + 1).clamp_(min=0), 0)


def surviving_blocks(bands: Bands, tokens_per_frame: int, block: int, side: int, *, strict: bool) -> Tensor:
    """The blocks that the union of the bands keeps.

    Args:
        bands: the frame pairs.
        tokens_per_frame: s.
        block: block size B in tokens.
        side: blocks of the grid along one side, from the first; others are left out.
        strict: False keeps every block that holds at least one kept token pair (a cover). True applies the
            released reduction (of the public inference code): each frame pair is seen on a canvas of exactly
            ceil(s/B) blocks a side that starts at the block of the frame's first token, what sticks out is lost, and
            a block survives when more than 60 % of its covered columns are covered on more than B/3 rows.

    Returns:
        int64 vector of ``row * side + column``, ascending, without repeats.
    """
    keys = [torch.empty(0, dtype=torch.int64)]
    per_frame = -(-tokens_per_frame // block) + 1
    widest = (2 * bands.width // block + 3).clamp_(max=per_frame) * per_frame
    splits = torch.searchsorted(widest.cumsum(0), torch.arange(_CHUNK, int(widest.sum()) + _CHUNK, _CHUNK)) + 1
    edges = [0, *sorted({min(int(e), len(widest)) for e in splits})]
    for start, stop in itertools.pairwise(edges):
        part = Bands(bands.query[start:stop], bands.key[start:stop], bands.width[start:stop])
        keys.append(_survivors(part, tokens_per_frame, block, side, strict))
    found = torch.cat(keys)
    # narrow numbers sort in half the time
    return torch.unique(found.int() if side**2 < 2**31 else found).long()


def _survivors(bands: Bands, s: int, block: int, side: int, strict: bool) -> Tensor:
    # token indices fit in 32 bits, at half the memory traffic of 64
    x_start, y_start, width = ((bands.query * s).int(), (bands.key * s).int(), bands.width.int())
    x_end, y_end = x_start + s, y_start + s  # exclusive
    if strict:
        canvas = -(-s // block)
        x_end = torch.minimum(x_end, (x_start // block + canvas) * block)
        y_end = torch.minimum(y_end, (y_start // block + canvas) * block)

    # one entry a (frame pair, block row)
    block_rows = (x_end - 1) // block - x_start // block + 1
    x_start, y_start, x_end, y_end, w, row = repeat_each(block_rows, x_start, y_start, x_end, y_end, width)
    row = row + x_start // block
    x0 = torch.maximum(row * block, x_start)
    x1 = torch.minimum((row + 1) * block, x_end) - 1
    shift = x_start - y_start
    y_low = torch.maximum(y_start, x0 - shift - w)
    y_high = torch.minimum(y_end - 1, x1 - shift + w)
    block_columns = (torch.div(y_high, block, rounding_mode="floor") - y_low // block + 1).clamp_(min=0)
    block_columns[y_low > y_high] = 0

    # one entry a candidate block
    first = y_low // block
    x0, x1, shift, w, y_start, y_end, row, first, column = repeat_each(
        block_columns, x0, x1, shift, w, y_start, y_end, row, first
    )
    column = column + first
    y0 = torch.maximum(column * block, y_start)
    y1 = torch.minimum((column + 1) * block, y_end) - 1
    covered = _columns_covered(1, x0, x1, y0, y1, shift, w)
    if strict:
        well_covered = _columns_covered(block // 3 + 1, x0, x1, y0, y1, shift, w)
        kept = 10 * well_covered > 6 * covered
    else:
        kept = covered > 0
    kept &= (row < side) & (column < side)
    return row[kept].long() * side + column[kept]
