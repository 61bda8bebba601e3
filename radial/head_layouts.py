"""Layouts of patterns whose heads have masks of their own.

`HeadLayouts` stands for all layers of a model, and has one handle: a compiled block passes it as a constant, and its
layer as a tensor, so that all layers are one graph. `HeadLayout` is one layer. Heads with equal masks share one: a
layer keeps a list of masks and which of them each head has. Lists are built when a layer first runs, and kept in CPU
memory in 16 bits where the numbers of blocks fit, rows only; `radial.backends.lists` makes what kernels read from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.layout import check_block, layout_rows, new_handle, pair_share, register, whole_order
from radial.patterns import Pattern


class Masks(NamedTuple):
    """The different masks of a layer's heads, on the CPU.

    Attributes:
        of_head: (heads,) int64, the mask of each head.
        row_offsets: (masks, blocks + 1) int32, where each query block's list starts in the mask's stretch of
            ``columns``.
        columns: (kept blocks of all masks,) int16 or int32, mask after mask: key blocks, ascending in each row.
    """

    of_head: Tensor
    row_offsets: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class HeadLayouts:
    """The layouts of all layers for some of a model's heads. Built by `build_head_layouts`.

    Attributes:
        pattern, grid, block: what they are built from; block size in tokens.
        layers, heads: of the model.
        first, own: the heads that this object is for: ``own`` of them from ``first`` on.
        handle: as `radial.layout.BlockLayout.handle`.
    """

    pattern: Pattern
    grid: VideoGrid
    block: int
    layers: int
    heads: int
    first: int
    own: int
    handle: int = field(default_factory=new_handle)
    by_head: ClassVar[bool] = True
    is_dense: ClassVar[bool] = False
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        register(self.handle, self)
        self._derived["layers"] = [HeadLayout(self, index) for index in range(self.layers)]

    @property
    def blocks(self) -> int:
        """Blocks along one side, the partial last one included."""
        return -(-self.grid.tokens // self.block)

    @property
    def complete_blocks(self) -> int:
        """Blocks that hold nothing but video tokens; those after them are kept whole."""
        return self.grid.video_tokens // self.block

    def layer(self, index: int) -> HeadLayout:
        """The layout of one layer; its lists are built at their first use."""
        layers: list[HeadLayout] = self._derived["layers"]
        return layers[index]

    def part(self, index: int, parts: int) -> HeadLayouts:
        """The layouts of one of equal parts of the heads: what a rank needs that computes only these."""
        own = self.own // parts
        return self.derived(
            ("part", index, parts),
            lambda: replace(self, first=self.first + index * own, own=own, handle=new_handle(), _derived={}),
        )

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make()`` returns, made once for each key and kept as long as this object."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def orders(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The pattern's order of the tokens and its inverse, as of `radial.layout.BlockLayout`."""

        def make() -> tuple[Tensor, Tensor] | None:
            order = whole_order(self.pattern, self.grid, self.block)
            return None if order is None else (order.to(device), order.argsort().to(device))

        found: tuple[Tensor, Tensor] | None = self.derived(("orders", str(device)), make)
        return found


class HeadLayout:
    """One layer of `HeadLayouts`: which key blocks each query block of each head attends to.

    Attributes:
        family: the layouts of all layers, with what they have in common.
        index: the layer.
        layer: the same as a tensor, int64, on the CPU, without dimensions.
    """

    by_head: ClassVar[bool] = True
    is_dense: ClassVar[bool] = False

    def __init__(self, family: HeadLayouts, index: int) -> None:
        self.family, self.index, self.layer = family, index, torch.tensor(index)

    @property
    def pattern(self) -> Pattern:
        return self.family.pattern

    @property
    def grid(self) -> VideoGrid:
        return self.family.grid

    @property
    def block(self) -> int:
        return self.family.block

    @property
    def handle(self) -> int:
        return self.family.handle

    @property
    def blocks(self) -> int:
        return self.family.blocks

    @property
    def complete_blocks(self) -> int:
        return self.family.complete_blocks

    @cached_property
    def masks(self) -> Masks:
        """The lists of this layer's heads."""
        family, blocks = self.family, self.blocks
        patterns = [
            family.pattern.of_head(self.index, head, family.heads)
            for head in range(family.first, family.first + family.own)
        ]
        different = list(dict.fromkeys(patterns))
        rows = [layout_rows(pattern, family.grid, family.block) for pattern in different]
        narrow = torch.int16 if blocks < 2**15 else torch.int32
        return Masks(
            torch.tensor([different.index(pattern) for pattern in patterns]),
            torch.stack([offsets for offsets, _, _ in rows]),
            torch.cat([columns.to(narrow) for _, columns, _ in rows]),
        )

    @cached_property
    def kept(self) -> float:
        """Surviving blocks of a head, in the mean over heads."""
        of_head, offsets, _ = self.masks
        return offsets[of_head, -1].double().mean().item()

    @property
    def sparsity(self) -> float:
        """Share of all blocks that are skipped."""
        return 1.0 - self.kept / self.blocks**2

    @cached_property
    def density(self) -> float:
        """Share of all query-key token pairs that are computed, in the mean over heads."""
        of_head, offsets, _ = self.masks
        shares = [pair_share(kept, self.grid, self.block) for kept in offsets[of_head, -1].tolist()]
        return sum(shares) / len(shares)

    def flops(self, heads: int, head_dim: int) -> float:
        """Floating-point operations of one attention forward of one sample: 4 x head_dim x heads x token pairs."""
        return 4.0 * head_dim * heads * self.density * self.grid.tokens**2

    def rows(self, mask: int) -> tuple[Tensor, Tensor]:
        """``row_offsets`` (blocks + 1,) and ``columns`` of one of `masks`."""
        offsets = self.masks.row_offsets
        start = int(offsets[:mask, -1].sum())
        return offsets[mask], self.masks.columns[start : start + int(offsets[mask, -1])]

    def mask(self) -> Tensor:
        """The boolean block masks, (heads, blocks, blocks): for tests and pictures, not for kernels."""
        of_head, offsets, _ = self.masks
        dense = torch.zeros(len(offsets), self.blocks, self.blocks, dtype=torch.bool)
        for index, mask in enumerate(dense):
            row_offsets, columns = self.rows(index)
            mask[torch.repeat_interleave(torch.arange(self.blocks), row_offsets.long().diff()), columns.long()] = True
        return dense[of_head]

    def orders(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """See `HeadLayouts.orders`."""
        return self.family.orders(device)


@lru_cache(maxsize=4)
def build_head_layouts(pattern: Pattern, grid: VideoGrid, block: int, *, layers: int, heads: int) -> HeadLayouts:
    """The layouts of a pattern that differs by head, cached by their arguments.

    Raises:
        RadialError: a block size that is not a power of two of at least 16.
    """
    check_block(block)
    return HeadLayouts(pattern, grid, block, layers, heads, 0, heads)
