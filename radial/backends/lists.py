"""Block lists as GPU kernels read them: one padded list for each tile, text that needs a mask apart.

A tile is a query block with its list of key blocks (forward) or a key block with its list of query blocks (backward).
Where samples have text padding, the text columns are in lists of their own, whose blocks the kernel checks key by key
against each sample's length; a sample's lists end after its last text block with a key that counts.

Where masks differ by head, each head has lists of its own, made on the device from a layer's masks; text is in every
mask alike, and so are the tiles' order and the share of its list at which each tile starts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from radial.backends.fa4.schedule import Schedule
from radial.head_layouts import HeadLayout, HeadLayouts
from radial.layout import BlockLayout


class Lists(NamedTuple):
    """Block lists of one direction on the device, int32; the last dimension contiguous.

    flash-attn-4 works through the masked list, then through the full one: in the forward each from its end, and only
    the first block it meets is checked against the sequence's end.

    Attributes:
        masked_count: (batch or 1, 1, blocks) blocks whose keys need the text mask. masked: (1, 1, blocks, width).
        full_count: (1, heads or 1, blocks). full: (1, heads or 1, blocks, width).
        order: (blocks,) the order in which the grid's tiles are issued.
    """

    masked_count: Tensor
    masked: Tensor
    full_count: Tensor
    full: Tensor
    order: Tensor

    def of_heads(self, heads: slice) -> Lists:
        """The lists of some of the heads; those that serve all heads are what they are."""
        if self.full.shape[1] == 1:
            return self
        return self._replace(full_count=self.full_count[:, heads], full=self.full[:, heads])


def block_lists(
    layout: BlockLayout | HeadLayout,
    *,
    backward: bool,
    masks: bool,
    scheduled: bool,
    device: torch.device | None = None,
) -> Lists:
    """The lists of one direction.

    Args:
        layout: of any pattern. What is one mask for all heads there is R = blocks rows below; masks that differ by
            head are R = masks x blocks rows, mask after mask.
        backward: query blocks for each key block, not key blocks for each query block.
        masks: samples have text padding. ``masked_count`` is 0 then; `masked_counts` has each sample's.
        scheduled: order and lists follow `radial.backends.fa4.schedule`, in the forward for a kernel that walks its
            lists from the end; else everything ascends.
        device: where the lists of masks that differ by head go; a `BlockLayout` has them on its own device.
    """
    blocks, complete = layout.blocks, layout.complete_blocks
    if isinstance(layout, HeadLayout):
        found = layout.masks(device, transposed=backward)
        of_head, indices = found.of_head, found.columns.int()
        counts = found.row_offsets.long().diff(dim=1).flatten()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    else:
        of_head, device = None, layout.columns.device
        offsets, indices = (layout.column_offsets, layout.rows) if backward else (layout.row_offsets, layout.columns)
    counts = offsets.diff()
    rows = len(counts)
    everything = torch.arange(blocks, dtype=torch.int32, device=device)
    order, start = everything, None
    if scheduled:
        schedule = _schedule(layout, counts, of_head, backward, device)
        order, start = schedule.order.int().to(device), schedule.start.repeat(rows // blocks)
    masked = everything[:1]
    if masks:
        owner = torch.repeat_interleave(torch.arange(rows, dtype=torch.int32, device=device), counts)
        kept = (owner % blocks if backward else indices) < complete
        counts = torch.bincount(owner[kept], minlength=rows)
        offsets, indices = torch.cat([counts.new_zeros(1), counts.cumsum(0)]), indices[kept]
        masked = everything if backward else everything[complete:]
    full = padded_lists(offsets, indices, start, backwards=not backward, last_first=not backward and not masks)
    full, counts = full.view(rows // blocks, blocks, full.shape[-1]), counts.int().view(rows // blocks, blocks)
    if of_head is not None:
        full, counts = full[of_head], counts[of_head]
    return Lists(
        masked_count=torch.zeros(1, 1, blocks, dtype=torch.int32, device=device),
        masked=masked.expand(1, 1, blocks, len(masked)),
        full_count=counts[None],
        full=full[None],
        order=order,
    )


def _schedule(
    layout: BlockLayout | HeadLayout,
    counts: Tensor,
    of_head: Tensor | None,
    backward: bool,
    device: torch.device | None,
) -> Schedule:
    """The schedule of the lists; of masks that differ by head it follows their mean, and is kept on their device."""
    direction = "backward" if backward else "forward"
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def make(counts: Tensor) -> Schedule:
        return Schedule.of(counts, layout.grid, layout.block, multiprocessors=multiprocessors, direction=direction)

    if of_head is None or not isinstance(layout, HeadLayout):
        return make(counts)

    def of_mean() -> Schedule:
        made = make(counts.view(-1, layout.blocks)[of_head].double().mean(0).round().long())
        return Schedule(made.order.to(device), made.start.to(device))

    # a layer's lists are made whenever it runs; this, which waits for the device, once
    schedule: Schedule = layout.family.derived(("schedule", layout.index, direction, str(device)), of_mean)
    return schedule


def masked_counts(layout: BlockLayout | HeadLayout | HeadLayouts, valid: Tensor, *, backward: bool) -> Tensor:
    """How much of each tile's masked list counts, (batch, 1, blocks) int32; ``valid`` (batch,) keys of each sample."""
    if backward:
        tile = torch.arange(layout.blocks, device=valid.device)
        reached = (tile >= layout.complete_blocks) & (tile * layout.block < valid[:, None])
        count = torch.where(reached, layout.blocks, 0)
    else:
        reached = (valid + layout.block - 1) // layout.block - layout.complete_blocks
        count = reached[:, None].repeat(1, layout.blocks)
    return count.int()[:, None]


def padded_lists(
    offsets: Tensor, indices: Tensor, start: Tensor | None = None, *, backwards: bool = False, last_first: bool = False
) -> Tensor:
    """The lists of a compressed matrix side by side, each in the order in which it is walked.

    Args:
        offsets: (blocks + 1,). indices: (entries,), ascending in each list.
        start: (blocks,) the share of the list at which the walk starts; it goes on to the end and from the beginning.
            None walks from the beginning.
        backwards: the reader walks from the end of what this returns, in descending order.
        last_first: the last entry is walked first, whatever ``start`` says.

    Returns:
        (blocks, longest list) int32, filled up with zeros.
    """
    begins, counts = offsets[:-1].long(), offsets.long().diff()
    width, entries = int(counts.max()), len(indices)

    def by_entry(of_list: Tensor) -> Tensor:
        # the known size saves waiting for the device
        return torch.repeat_interleave(of_list, counts, output_size=entries)

    entry = torch.arange(entries, dtype=torch.int32, device=offsets.device)
    begin = by_entry(begins.int())
    source = entry
    if start is not None:
        ring = (counts - 1 if last_first else counts).clamp(min=1)
        shift, size = by_entry((ring * start.to(ring.device)).int()), by_entry(ring.int())
        place = entry - begin
        turned = size - 1 - (size - 1 - place + shift) % size if backwards else (place + shift) % size
        source = begin + torch.where(place < size, turned, place)
    out = indices.new_zeros(len(counts), width, dtype=torch.int32)
    first = torch.arange(len(counts), device=offsets.device) * width - begins  # where entry 0 would be in a list's row
    out.view(-1)[by_entry(first) + entry] = indices[source].int()
    return out
