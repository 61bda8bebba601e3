"""Where attention's mass is summed: bins of distance and tiles of a frame, and which query rows stand for all.

Distances are within the video: temporal in latent frames, spatial in tokens, between the two places in their frames
(Euclidean, not along the raster order, in which a neighbour above is a whole row away).

A tile is a set of tokens of a frame: as many as attention's blocks have, in raster order (a strip) or in an order in
which they are a compact patch (`radial.patterns.token_orders`), or rows x columns. The last ones of a frame may be
smaller.

Rows are sampled: in every frame and tile, so many query tokens at random, without repeats. Each is weighted by what it
stands for, so that sums are unbiased. The first row of every tile together are a small sample of their own, and so are
the second ones, and so on: the spread of these replicates is where standard errors come from. A tile with no more
tokens than that is taken whole, into every replicate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from radial import VideoGrid
from radial.patterns.token_orders import frame_order
from train.flow import generator_for


@dataclass(frozen=True)
class Tiling:
    """The tiles of a frame: rows x columns.

    Args:
        height, width: of a tile, in tokens.
    """

    height: int
    width: int

    def of(self, grid: VideoGrid) -> Tensor:
        """The tile of each place of a frame, (tokens_per_frame,) int64."""
        places = torch.arange(grid.tokens_per_frame)
        across = -(-grid.width // self.width)
        return places // grid.width // self.height * across + places % grid.width // self.width

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class Blocks:
    """Tiles of as many tokens as a block, one after another in an order of the frame's tokens.

    Args:
        order: one of `radial.patterns.token_orders.ORDERS`.
        block: tokens of a tile.
    """

    order: str
    block: int

    def of(self, grid: VideoGrid) -> Tensor:
        """As of `Tiling`."""
        order = frame_order(self.order, grid.height, grid.width, self.block)
        return order.argsort() // self.block

    def __str__(self) -> str:
        return f"{'strips' if self.order == 'raster' else self.order} of {self.block}"


@dataclass(frozen=True)
class Geometry:
    """The bins of one grid.

    Attributes:
        grid: of the clip.
        tiling: the tiles of its frames.
    """

    grid: VideoGrid
    tiling: Tiling | Blocks

    @property
    def distances(self) -> int:
        """Temporal distances, from 0: those between two frames after the first."""
        return self.grid.frames - 1

    @cached_property
    def tile_of(self) -> Tensor:
        """The tile of each token of a frame, (tokens_per_frame,) int64."""
        return self.tiling.of(self.grid)

    @property
    def tiles(self) -> int:
        """Tiles of a frame."""
        return int(self.tile_of.max()) + 1

    @cached_property
    def tile_matrix(self) -> Tensor:
        """(tokens_per_frame, tiles) float32: 1 where a token is in a tile."""
        return torch.nn.functional.one_hot(self.tile_of, self.tiles).float()

    @cached_property
    def _offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each offset (rows, columns) between two places of a frame: its bin, its length, and how many pairs have
        it."""
        rows, columns = torch.arange(self.grid.height)[:, None], torch.arange(self.grid.width)
        length = (rows**2 + columns**2).double().sqrt()
        pairs = (self.grid.height - rows) * (self.grid.width - columns)
        pairs = pairs * (1 + (rows > 0)) * (1 + (columns > 0))  # offsets in both directions
        return length.round().long(), length, pairs.double()

    @property
    def reach(self) -> int:
        """Bins of spatial distance: whole numbers of tokens from 0."""
        return int(self._offsets[0].max()) + 1

    @cached_property
    def spatial_pairs(self) -> Tensor:
        """(reach,) float64: pairs of places of a frame in each bin."""
        bins, _, pairs = self._offsets
        return torch.zeros(self.reach, dtype=torch.float64).index_add_(0, bins.flatten(), pairs.flatten())

    @cached_property
    def spatial_distance(self) -> Tensor:
        """(reach,) float64: the mean distance in each bin, in tokens."""
        bins, length, pairs = self._offsets
        total = torch.zeros(self.reach, dtype=torch.float64)
        total.index_add_(0, bins.flatten(), (length * pairs).flatten())
        return total / self.spatial_pairs.clamp(min=1)

    @cached_property
    def temporal_pairs(self) -> Tensor:
        """(distances,) float64: pairs of frames after the first at each distance."""
        frames = self.distances
        pairs = 2.0 * (frames - torch.arange(frames, dtype=torch.float64))
        pairs[0] = frames
        return pairs

    def spatial_bins(self, places: Tensor) -> Tensor:
        """(len(places), tokens_per_frame) int64: the bin of each place's distance to every place of a frame."""
        every = torch.arange(self.grid.tokens_per_frame, device=places.device)
        width = self.grid.width
        rows = places[:, None] // width - every // width
        columns = places[:, None] % width - every % width
        return (rows**2 + columns**2).double().sqrt().round().long()


@dataclass(frozen=True)
class QueryRows:
    """The sampled query rows of a clip, as many in each frame.

    Attributes:
        places: (frames, rows) int64, places in their frames.
        tile: (rows,) int64, the tile that a row is drawn from, in every frame.
        share: (rows, replicates) float64: the share of its frame that a row stands for in a replicate; a replicate's
            shares add up to 1.
        exact: all tokens are there.
    """

    places: Tensor
    tile: Tensor
    share: Tensor
    exact: bool

    @classmethod
    def draw(cls, geometry: Geometry, rows: int, *key: object) -> QueryRows:
        """Draws ``rows`` of each tile in each frame; where a tile has no more tokens, it is taken whole.

        Args:
            rows: at least 1; standard errors need 2.
            key: seeds the draw.
        """
        tile_of, frames = geometry.tile_of, geometry.grid.frames
        sizes = torch.bincount(tile_of)
        drawn = sizes.clamp(max=rows)
        noise = torch.rand(frames, len(tile_of), dtype=torch.float64, generator=generator_for(*key, "rows"))
        by_tile = (tile_of + noise).argsort(1)  # tokens of a tile side by side, in random order
        starts = sizes.cumsum(0) - sizes
        chosen = torch.cat([torch.arange(n) + start for start, n in zip(starts.tolist(), drawn.tolist(), strict=True)])
        tile = torch.arange(len(sizes)).repeat_interleave(drawn)
        exact = bool((drawn == sizes).all())
        replicates = 1 if exact else rows
        rank = torch.cat([torch.arange(n) for n in drawn.tolist()])
        own = torch.nn.functional.one_hot(rank % replicates, replicates).double()
        whole = (drawn == sizes)[tile, None]
        share = torch.where(whole, 1 / drawn[tile, None], own) * (sizes[tile, None] / len(tile_of))
        return cls(by_tile[:, chosen], tile, share, exact)

    @property
    def replicates(self) -> int:
        """Independent samples that the rows consist of; 1 where nothing is left to chance."""
        return self.share.shape[1]
