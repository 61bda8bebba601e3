"""Masks fitted to a model's own heads: the blocks with most of their attention, and a thin, even coverage of the rest.

Which pairs a head's rule keeps stands in a file (`radial.patterns.head_masks`); `radial.fit` makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from radial.grid import VideoGrid
from radial.patterns.base import Pattern
from radial.patterns.head_masks import About, HeadMasks
from radial.patterns.token_orders import frame_order

_ONE = 2**31  # what places in the draw are counted in
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Fitted(Pattern):
    """Masks that differ by head and layer.

    Blocks are of tokens in the order that the masks' file names. A block stands for its middle token: the frame and the
    tile that this is in, and so a pair of blocks for (temporal distance, query tile, key tile). Head h of layer l keeps
    a pair

    * if the bit of the head's rule is set; or
    * if it is on the diagonal, so that every query block has a key block; or
    * if it is drawn: (u + n / N) mod 1 < rate, where N is the number of all heads of all layers, and n = 0 ... N - 1
      the head's place among them in an order that puts neighbours far apart. In each row of blocks, stretches of K =
      round(1 / rate) key blocks have u = 0, 1 / K ... (K - 1) / K in turn, moved by a hash of seed, row and stretch,
      where as many rows as the file says count as one.

    So a head draws about one key block in each stretch, at a place of its own, and a pair of blocks is drawn by floor
    or ceil of N rate heads: where this is at least one, some head of the model sees any pair. Draws in stretches change
    a head's output less than independent ones, and those that neighbouring rows share as little (radial/README.md); of
    key blocks that neighbouring rows share, a kernel finds more in its cache.

    A clip of more frames than those that the masks are fitted to has its distances scaled to theirs, (F - 1) / (frames
    - 1), rounded to the nearest: what temporal positions that are interpolated to the native range do. In a shorter
    clip distances are what they are.

    Args:
        masks: the rules.
        layer, head: of one head's mask; None: the pattern of the whole model.
    """

    masks: HeadMasks
    layer: int | None = None
    head: int = 0
    name: ClassVar[str] = "fitted"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        """As of `Pattern`; of the whole model the pairs that most heads keep, as many as a head keeps in the mean."""
        if self.layer is not None:
            own = range(self.head, self.head + 1)
            return self.head_blocks(self.layer, own, self.masks.heads, grid, block)[0].flatten().nonzero().flatten()
        about, side = self.masks.about, grid.video_tokens // block
        about.check_grid(grid, block)
        heads = len(about.layers) * self.masks.heads
        often = self.masks.often[bit_of_pairs(about, grid, torch.device("cpu"))].view(side, side)
        often.fill_diagonal_(heads)
        kept = often.double().mean().item() / heads
        count = round((kept + about.rate * (1 - kept)) * side**2)
        return often.flatten().sort(descending=True, stable=True).indices[:count].sort().values

    def token_order(self, grid: VideoGrid, block: int) -> Tensor | None:
        about = self.masks.about
        if about.order == "raster":
            return None
        frame = frame_order(about.order, grid.height, grid.width, block)
        return (torch.arange(grid.frames)[:, None] * grid.tokens_per_frame + frame).flatten()

    @property
    def by_head(self) -> bool:
        return self.layer is None

    def of_head(self, layer: int, head: int, heads: int) -> Pattern:
        return replace(self, layer=layer, head=head)

    def head_blocks(
        self, layer: int, own: range, heads: int, grid: VideoGrid, block: int, device: torch.device | None = None
    ) -> Tensor:
        about, side = self.masks.about, grid.video_tokens // block
        about.check_grid(grid, block)
        place, device = self.masks.place_of(layer, heads), device or torch.device("cpu")
        rules = self.masks.bits[place, own.start : own.stop].to(device)
        bits, draws = bit_of_pairs(about, grid, device), _draws(about, side, device)
        byte, bit = bits >> 3, (bits & 7).to(torch.uint8)
        everyone = len(about.layers) * heads
        width = round(about.rate * _ONE)
        kept = torch.empty(len(own), side * side, dtype=torch.bool, device=device)
        for index, head in enumerate(own):
            turn = spread(place * heads + head, everyone) * _ONE // everyone
            drawn = (draws + turn & _ONE - 1) <= width - 1  # at a rate of 1, width itself is no int32
            torch.logical_or(rules[index][byte] >> bit & 1, drawn, out=kept[index])
        kept = kept.view(len(own), side, side)
        kept.diagonal(dim1=1, dim2=2).fill_(True)
        return kept


def spread(place: int, places: int) -> int:
    """The place in an order of ``places`` things in which those that are neighbours come far apart, a permutation."""
    step = round(places * _GOLDEN)
    while math.gcd(step, places) != 1:
        step += 1
    return place * step % places


@lru_cache(maxsize=4)
def bit_of_pairs(about: About, grid: VideoGrid, device: torch.device) -> Tensor:
    """(pairs of complete blocks,) int32: the bit of a rule for each."""
    centre = torch.arange(grid.video_tokens // about.block, device=device) * about.block + about.block // 2
    frame, tile = centre // grid.tokens_per_frame, centre % grid.tokens_per_frame // about.block
    distance = frame - frame[:, None]
    if grid.frames > about.frames:
        there, here = about.frames - 1, grid.frames - 1
        distance = distance.sign() * ((2 * distance.abs() * there + here) // (2 * here))
    distance = distance + about.frames - 1
    distance[:, frame == 0] = 2 * about.frames - 1
    return ((distance * about.tiles + tile[:, None]) * about.tiles + tile).flatten().int()


@lru_cache(maxsize=4)
def _draws(about: About, side: int, device: torch.device) -> Tensor:
    """(pairs of complete blocks,) int32: u of each, in units of 1 / `_ONE`."""
    row = torch.arange(side, device=device)[:, None]
    key = torch.arange(side, device=device)
    stretch = round(1 / about.rate) if about.rate * side > 1 else max(side, 1)
    x = (row // about.rows * side + key // stretch) ^ (about.seed + 1) * 0x9E3779B1 % 2**32
    for _ in range(2):  # each product is below 2^59
        x = (x >> 16 ^ x) * 0x45D9F3B % 2**32
    return ((x >> 16 ^ x) + key % stretch * _ONE // stretch & _ONE - 1).flatten().int()
