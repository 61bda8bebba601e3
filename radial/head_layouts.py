"""Layouts of patterns whose heads have masks of their own.

`HeadLayouts` stands for all layers of a model, and has one handle: a compiled block passes it as a constant, and its
layer as a tensor, so that all layers are one graph. `HeadLayout` is one layer. Heads with equal masks share one: a
layer keeps a list of masks and which of them each head has. Lists are built when a layer first runs, and kept in CPU
memory in 16 bits where the numbers of blocks fit, rows only; `radial.backends.lists` makes what kernels read from them.
Where a pattern works out the masks of a layer at once (`Pattern.head_blocks`), they are made on the device that reads
them whenever the layer runs, and not kept: the lists of 40 layers of 40 heads at 291,600 tokens take 2.2 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.layout import (
    BlockLayout,
    build_layout,
    check_block,
    copy_of,
    layout_rows,
    new_handle,
    pair_share,
    register,
    whole_order,
)
from radial.patterns import Pattern


class Masks(NamedTuple):
    """The different masks of a layer's heads, on one device.

    Attributes:
        of_head: (heads,) int64, the mask of each head.
        row_offsets: (masks, blocks + 1) int32, where each query block's list starts in the mask's stretch of
            ``columns``.
        columns: (kept blocks of all masks,) int16 or int32, mask after mask: key blocks, ascending in each row.
    """

    of_head: Tensor
    row_offsets: Tensor
    columns: Tensor

    def rows(self, mask: int) -> tuple[Tensor, Tensor]:
        """``row_offsets`` (blocks + 1,) and ``columns`` of one of them."""
        start = int(self.row_offsets[:mask, -1].sum())
        return self.row_offsets[mask], self.columns[start : start + int(self.row_offsets[mask, -1])]


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

    def __reduce__(self) -> tuple[Callable[[], HeadLayouts], tuple[()]]:
        return copy_of(self), ()

    @property
    def blocks(self) -> int:
        """Blocks along one side, the partial last one included."""
        return -(-self.grid.tokens // self.block)

    @property
    def complete_blocks(self) -> int:
        """Blocks that hold nothing but video tokens; those after them are kept whole."""
        return self.grid.video_tokens // self.block

    def layer(self, index: int) -> HeadLayout:
        """The layout of one layer; its lists are built at their first use.

        Raises:
            RadialError: the model has no such layer.
        """
        if not 0 <= index < self.layers:
            raise RadialError(f"layer is {index}, expected one of the model's {self.layers} layers, from 0 on")
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
        self.family, self.index = family, index
        with torch.inference_mode(False):  # kept for later calls, whose backward saves it
            self.layer = torch.tensor(index)

    def __reduce__(self) -> tuple[Callable[[HeadLayouts, int], HeadLayout], tuple[HeadLayouts, int]]:
        return HeadLayouts.layer, (self.family, self.index)  # a copy is of the copied family's layers

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

    def masks(self, device: torch.device | None = None, *, transposed: bool = False) -> Masks:
        """The lists of this layer's heads on a device, by default the CPU.

        Args:
            transposed: of query blocks for each key block, ``row_offsets`` of key blocks and ``columns`` of query
                blocks.
        """
        family, device = self.family, device or torch.device("cpu")
        own = range(family.first, family.first + family.own)
        kept = family.pattern.head_blocks(self.index, own, family.heads, family.grid, family.block, device)
        if kept is None:
            of_head, offsets, columns = self._kept_transposed if transposed else self._kept_masks
            return Masks(of_head.to(device), offsets.to(device), columns.to(device))
        blocks = self.blocks
        whole = torch.ones(len(own), blocks, blocks, dtype=torch.bool, device=device)
        whole[:, : kept.shape[1], : kept.shape[1]] = kept.mT if transposed else kept
        return Masks(
            torch.arange(len(own), device=device),
            F.pad(whole.sum(-1).cumsum(1), (1, 0)).int(),
            (whole.flatten().nonzero().flatten() % blocks).to(_narrow(blocks)),
        )

    def of_head(self, head: int) -> BlockLayout:
        """The layout of one of the model's heads alone: for checks, not for kernels."""
        family = self.family
        return build_layout(family.pattern.of_head(self.index, head, family.heads), family.grid, family.block)

    @cached_property
    def _kept_masks(self) -> Masks:
        """The masks of a pattern that is asked head by head, on the CPU."""
        family = self.family
        patterns = [
            family.pattern.of_head(self.index, head, family.heads)
            for head in range(family.first, family.first + family.own)
        ]
        different = list(dict.fromkeys(patterns))
        rows = [layout_rows(pattern, family.grid, family.block) for pattern in different]
        return Masks(
            torch.tensor([different.index(pattern) for pattern in patterns]),
            torch.stack([offsets for offsets, _, _ in rows]),
            torch.cat([columns.to(_narrow(self.blocks)) for _, columns, _ in rows]),
        )

    @cached_property
    def _kept_transposed(self) -> Masks:
        """Those of each key block."""
        of_head, offsets, columns = self._kept_masks
        blocks, masks = self.blocks, len(offsets)
        owner = torch.repeat_interleave(torch.arange(masks * blocks), offsets.long().diff(dim=1).flatten())
        # by mask and column; within a column the numbers of the rows ascend
        keys = ((owner // blocks * blocks + columns.long()) * blocks + owner % blocks).sort().values
        counts = torch.bincount(keys // blocks, minlength=masks * blocks).view(masks, blocks)
        return Masks(of_head, F.pad(counts.cumsum(1), (1, 0)).int(), (keys % blocks).to(columns.dtype))

    @cached_property
    def _kept_by_head(self) -> list[int]:
        """Surviving blocks of each head."""
        of_head, offsets, _ = self.masks()
        counts: list[int] = offsets[of_head, -1].tolist()
        return counts

    @property
    def kept(self) -> float:
        """Surviving blocks of a head, in the mean over heads."""
        return sum(self._kept_by_head) / len(self._kept_by_head)

    @property
    def sparsity(self) -> float:
        """Share of all blocks that are skipped."""
        return 1.0 - self.kept / self.blocks**2

    @cached_property
    def density(self) -> float:
        """Share of all query-key token pairs that are computed, in the mean over heads."""
        shares = [pair_share(kept, self.grid, self.block) for kept in self._kept_by_head]
        return sum(shares) / len(shares)

    def flops(self, heads: int, head_dim: int) -> float:
        """Floating-point operations of one attention forward of one sample: 4 x head_dim x heads x token pairs."""
        return 4.0 * head_dim * heads * self.density * self.grid.tokens**2

    def mask(self) -> Tensor:
        """The boolean block masks, (heads, blocks, blocks): for tests and pictures, not for kernels."""
        masks = self.masks()
        dense = torch.zeros(len(masks.row_offsets), self.blocks, self.blocks, dtype=torch.bool)
        for index, mask in enumerate(dense):
            row_offsets, columns = masks.rows(index)
            mask[torch.repeat_interleave(torch.arange(self.blocks), row_offsets.long().diff()), columns.long()] = True
        return dense[masks.of_head]

    def orders(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """See `HeadLayouts.orders`."""
        return self.family.orders(device)


def _narrow(blocks: int) -> torch.dtype:
    """The smallest dtype that holds the numbers of so many blocks."""
    return torch.int16 if blocks < 2**15 else torch.int32


@lru_cache(maxsize=4)
def build_head_layouts(pattern: Pattern, grid: VideoGrid, block: int, *, layers: int, heads: int) -> HeadLayouts:
    """The layouts of a pattern that differs by head, cached by their arguments.

    Raises:
        RadialError: a block size that is not a power of two of at least 16.
    """
    check_block(block)
    return HeadLayouts(pattern, grid, block, layers, heads, 0, heads)
