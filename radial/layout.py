"""The pattern worked out for one grid: block lists in both directions, ready for a kernel.

A `BlockLayout` is a block-sparse matrix in compressed form. Query block i attends to key blocks
``columns[row_offsets[i]:row_offsets[i + 1]]``; the transpose, which a backward pass over key blocks reads, is
``rows[column_offsets[j]:column_offsets[j + 1]]``. All four are int32.

What the released code leaves undefined, or without sense, is defined here, for every pattern:

* the last, partial block of the video and all blocks of text tokens (from block ``video_tokens // B`` on) are kept
  whole, as rows and as columns;
* any other query block that the pattern leaves without a key block of the video takes the union of the key blocks of
  the nearest non-empty query blocks above and below it; if every one is empty (a frame of fewer than about B/3
  tokens), they attend to everything. The released code lets such a query block of HunyuanVideo see the text alone (8 of
  525 at 544 x 960 and 129 frames, none at 720 x 1280); `BlockLayout.filled_rows` counts them.

Blocks are of tokens in the pattern's own order, where it has one (`Pattern.token_order`); the callers' tokens are in
raster order all the same, or in that order already (`radial.attention_over`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns import Pattern

if TYPE_CHECKING:
    from radial.head_layouts import HeadLayouts

_TENSORS = ("row_offsets", "columns", "column_offsets", "rows", "order", "inverse_order")
_OWN = ("handle", "_derived")  # of one object, so that no copy has them
_HANDLES = itertools.count()
_LIVE: WeakValueDictionary[int, Any] = WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which key blocks each query block attends to (see the module text). Built by `build_layout`.

    Attributes:
        pattern, grid, block: what it was built from; block size in tokens.
        row_offsets: (blocks + 1,) int32. columns: (kept,) int32, ascending in each row.
        column_offsets: (blocks + 1,) int32. rows: (kept,) int32, ascending in each column.
        handle: a number that stands for this object where only numbers and tensors may pass (`layout_of`).
        filled_rows: query blocks that the pattern leaves without a key block of the video (the module text).
        order: (tokens,) int64, which of the caller's tokens lies at each position of the blocks; None: each its own.
        inverse_order: (tokens,) int64, the position of each of the caller's tokens, or None.
    """

    pattern: Pattern
    grid: VideoGrid
    block: int
    row_offsets: Tensor
    columns: Tensor
    column_offsets: Tensor
    rows: Tensor
    handle: int = field(default_factory=lambda: new_handle())
    filled_rows: int = 0
    order: Tensor | None = None
    inverse_order: Tensor | None = None
    by_head: ClassVar[bool] = False
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        register(self.handle, self)

    def __reduce__(self) -> tuple[Callable[[], BlockLayout], tuple[()]]:
        return copy_of(self), ()

    @property
    def blocks(self) -> int:
        """Blocks along one side, the partial last one included."""
        return -(-self.grid.tokens // self.block)

    @property
    def complete_blocks(self) -> int:
        """Blocks that hold nothing but video tokens; those after them are kept whole."""
        return self.grid.video_tokens // self.block

    @property
    def kept(self) -> int:
        """Surviving blocks."""
        return self.columns.numel()

    @property
    def is_dense(self) -> bool:
        return self.kept == self.blocks**2

    @property
    def sparsity(self) -> float:
        """Share of all blocks that are skipped."""
        return 1.0 - self.kept / self.blocks**2

    @cached_property
    def video_sparsity(self) -> float:
        """Share of skipped blocks among the complete video blocks: the figure that papers quote."""
        c = self.complete_blocks
        tail = self.blocks - c
        return 1.0 - (self.kept - self.blocks**2 + c**2) / c**2 if c and tail else self.sparsity

    @cached_property
    def density(self) -> float:
        """Share of all query-key token pairs that are computed (the last block counted at its true size)."""
        return pair_share(self.kept, self.grid, self.block)

    def flops(self, heads: int, head_dim: int) -> float:
        """Floating-point operations of one attention forward of one sample: 4 x head_dim x heads x token pairs."""
        return 4.0 * head_dim * heads * self.density * self.grid.tokens**2

    def mask(self) -> Tensor:
        """The boolean block mask, (blocks, blocks): for tests and pictures, not for kernels."""
        dense = torch.zeros(self.blocks, self.blocks, dtype=torch.bool)
        counts = self.row_offsets.cpu().long().diff()
        dense[torch.repeat_interleave(torch.arange(self.blocks), counts), self.columns.cpu().long()] = True
        return dense

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once for each key and kept as long as this layout: a backend's own tables."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on ``device``; the copy is made once and kept."""
        device = torch.device(device)
        if device == self.columns.device:
            return self

        def copy() -> BlockLayout:
            moved: dict[str, Any] = {name: getattr(self, name) for name in _TENSORS}
            moved = {name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()}
            return replace(self, **moved, handle=new_handle(), _derived={})

        return self.derived(device, copy)

    def orders(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """`order` and `inverse_order` on a device, or None where blocks are of the caller's own order."""
        moved = self.to(device)
        return None if moved.order is None or moved.inverse_order is None else (moved.order, moved.inverse_order)


def new_handle() -> int:
    """A number that no layout has yet."""
    return next(_HANDLES)


def register(handle: int, layout: BlockLayout | HeadLayouts) -> None:
    """Lets `layout_of` find a layout by its handle, for as long as somebody else holds it."""
    _LIVE[handle] = layout


def copy_of(layout: BlockLayout | HeadLayouts) -> Callable[[], Any]:
    """What makes a `BlockLayout` or `HeadLayouts` again, here or in another process: for `copy` and `pickle`.

    The copy has a handle of its own, since this one's may stand for another layout there.
    """
    given = {each.name: getattr(layout, each.name) for each in fields(layout) if each.name not in _OWN}
    return partial(type(layout), **given)


def layout_of(handle: int) -> BlockLayout | HeadLayouts:
    """The living layout with this handle. A custom operator takes numbers and tensors, not objects."""
    found: BlockLayout | HeadLayouts = _LIVE[handle]
    return found


def pair_share(kept: int, grid: VideoGrid, block: int) -> float:
    """The share of a grid's token pairs in ``kept`` blocks; the last row and column are whole, and may be cut."""
    blocks = -(-grid.tokens // block)
    last = grid.tokens - (blocks - 1) * block
    if last == block:
        return kept / blocks**2
    inner = kept - 2 * blocks + 1
    border = 2 * (blocks - 1) * block * last + last**2
    return (inner * block**2 + border) / grid.tokens**2


def build_layout(pattern: Pattern, grid: VideoGrid, block: int = 128) -> BlockLayout:
    """`make_layout`, cached by its arguments.

    Of a pattern that differs by head it is one that stands for all (`Pattern.video_blocks`); `radial.head_layouts` has
    each head's.
    """
    return _cached_layout(pattern, grid, block)


def make_layout(pattern: Pattern, grid: VideoGrid, block: int) -> BlockLayout:
    """The layout of a pattern on a grid, on the CPU.

    Time and memory follow the surviving blocks (`python -m radial layouts`).

    Raises:
        RadialError: a block size that is not a power of two of at least 16.
    """
    row_offsets, columns, empty = layout_rows(pattern, grid, block)
    blocks = len(row_offsets) - 1
    owner = torch.repeat_interleave(torch.arange(blocks), row_offsets.long().diff())
    # within a column the stable sort leaves the rows ascending
    narrow = columns.short() if blocks < 2**15 else columns
    rows = owner[narrow.sort(stable=True).indices].int()
    column_offsets = _offsets(torch.bincount(columns, minlength=blocks))
    order = whole_order(pattern, grid, block)
    return BlockLayout(
        *(pattern, grid, block, row_offsets, columns, column_offsets, rows),
        filled_rows=empty,
        order=order,
        inverse_order=None if order is None else order.argsort(),
    )


_cached_layout = lru_cache(maxsize=64)(make_layout)  # apart, so that a default counts as the argument it stands for


def check_block(block: int) -> None:
    """Raises where no layout has blocks of this size.

    Raises:
        RadialError: not a power of two of at least 16.
    """
    if block < 16 or block & (block - 1):
        raise RadialError(f"block is {block}, expected a power of two of at least 16 (kernels use 64 or 128)")


def layout_rows(pattern: Pattern, grid: VideoGrid, block: int) -> tuple[Tensor, Tensor, int]:
    """``row_offsets``, ``columns`` and ``filled_rows`` of a pattern's `BlockLayout`.

    Raises:
        RadialError: a block size that is not a power of two of at least 16.
    """
    check_block(block)
    complete, blocks = grid.video_tokens // block, -(-grid.tokens // block)
    keys = pattern.video_blocks(grid, block) if complete else torch.empty(0, dtype=torch.int64)
    empty = int((_row_counts(keys, complete) == 0).sum())
    keys = fill_empty_rows(keys, complete)
    counts = _row_counts(keys, complete)
    row = torch.repeat_interleave(torch.arange(complete), counts)
    column = keys - row * complete
    # each complete row ends with the tail's columns; then the tail's rows follow, which are whole
    tail = blocks - complete
    row_counts = torch.cat([counts + tail, torch.full((tail,), blocks)])
    columns = torch.empty(int(row_counts.sum()), dtype=torch.int32)
    row_offsets = _offsets(row_counts)
    columns[torch.arange(len(keys)) + row * tail] = column.int()
    ends = row_offsets[1 : complete + 1, None] - tail + torch.arange(tail)
    columns[ends.flatten()] = torch.arange(complete, blocks, dtype=torch.int32).repeat(complete)
    columns[len(keys) + complete * tail :] = torch.arange(blocks, dtype=torch.int32).repeat(tail)
    return row_offsets, columns, empty


def whole_order(pattern: Pattern, grid: VideoGrid, block: int) -> Tensor | None:
    """The pattern's order of the video's tokens with the text's after it; None where the pattern has none."""
    video = pattern.token_order(grid, block)
    return None if video is None else torch.cat([video, torch.arange(grid.video_tokens, grid.tokens)])


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def _row_counts(keys: Tensor, side: int) -> Tensor:
    """Entries of each row among ascending keys ``row * side + column``."""
    return torch.searchsorted(keys, torch.arange(side + 1) * side).diff()


def fill_empty_rows(keys: Tensor, complete: int) -> Tensor:
    """``keys``, as of `Pattern.video_blocks`, with key blocks for query blocks that have none: see the module text.

    Args:
        keys: ascending numbers of pairs, int64.
        complete: blocks that hold nothing but video tokens.
    """
    counts = _row_counts(keys, complete)
    starts = counts.cumsum(0) - counts
    filled = counts.nonzero().flatten()
    found = [keys]
    for index in (counts == 0).nonzero().flatten().tolist():
        after = int(torch.searchsorted(filled, index))
        neighbours = [int(filled[p]) for p in (after - 1, after) if 0 <= p < len(filled)]
        parts = [keys[starts[n] : starts[n] + counts[n]] - n * complete for n in neighbours]
        columns = torch.unique(torch.cat(parts)) if parts else torch.arange(complete)
        found.append(index * complete + columns)
    return torch.cat(found).sort().values if len(found) > 1 else keys
