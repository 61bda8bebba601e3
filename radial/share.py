"""Patterns on equal terms: the value of a pattern's parameter that comes nearest to a share of dense blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import fill_empty_rows
from radial.patterns import PATTERNS, Fitted, Pattern

_CLOSE = 1e-3  # of the blocks that are wanted; nearer than this nothing better is looked for
_NARROW = 1e-4  # of the parameter: so near to each other, both ends are neighbouring steps of the pattern


@lru_cache(maxsize=64)
def with_share(pattern: Pattern, grid: VideoGrid, block: int, share: float) -> Pattern:
    """The pattern with that value of its parameter whose layout keeps nearest to a share of all blocks.

    What a layout really keeps is 1 - `BlockLayout.sparsity`: a parameter moves whole blocks, often many at once, and
    rows and columns of text and of a partial block are kept whatever it is.

    Args:
        pattern: its other fields stay.
        grid, block: what the share is of; with the same value the share of another grid is another.
        share: of the blocks that dense attention computes, above 0 and at most 1.

    Raises:
        RadialError: a share outside of that, or a pattern without a parameter.
    """
    if not (isinstance(share, (int, float)) and 0 < share <= 1):
        raise RadialError(f"share is {share!r}, expected a share of dense attention's blocks, above 0 and at most 1")
    name = pattern.parameter
    if isinstance(pattern, Fitted):
        raise RadialError(
            f"share is {share:g}, and pattern {pattern.name} has that of its masks, {pattern.masks.about.share:g}: "
            "leave it out, or fit masks with another one (python -m radial fit)"
        )
    if name is None:
        others = ", ".join(n for n, kind in PATTERNS.items() if kind.parameter)
        raise RadialError(
            f"share is {share:g}, and pattern {pattern.name} has no parameter to reach it with: leave it out, "
            f"or take one of {others}"
        )
    field: str = name
    complete, blocks = grid.video_tokens // block, -(-grid.tokens // block)
    wanted = share * blocks**2 - (blocks**2 - complete**2)

    def at(value: float) -> Pattern:
        changes: dict[str, Any] = {field: value}
        return replace(pattern, **changes)  # type: ignore[type-var]  # every pattern is a dataclass

    def kept(value: float) -> float:
        keys = at(value).video_blocks(grid, block)
        if len(keys) < complete:
            # Less than any count: with fewer than one a row, rows that are filled from others make the count fall as
            # the parameter grows, down from all blocks where the pattern has none.
            return -math.inf
        return len(fill_empty_rows(keys, complete))

    low, high = pattern.bounds(grid)
    fewest, most = kept(low), kept(high)
    while high - low > _NARROW * high and min(abs(fewest - wanted), abs(most - wanted)) > _CLOSE * wanted:
        middle = math.sqrt(low * high)
        count = kept(middle)
        if count < wanted:
            low, fewest = middle, count
        else:
            high, most = middle, count
    return at(low if abs(fewest - wanted) <= abs(most - wanted) else high)
