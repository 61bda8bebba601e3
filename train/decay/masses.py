"""Sums post-softmax attention of sampled query rows over bins, one frame of queries at a time.

No more than a few rows of probabilities lie in memory at a time; what is kept is as large as the bins. Scores and
softmax are computed in float32 (float64 for float64 inputs), whatever the model's numbers are.

The first frame is where models put attention that has nowhere to go (the sink), so it is counted apart: curves and
bins of distance are about queries and keys of later frames.

Shapes: H heads, G replicates of the rows, F frames, A tiles of a frame, D = F - 1 temporal distances, S bins of
spatial distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from radial import BlockLayout, HeadLayout
from train.decay.bins import Geometry, QueryRows

AT_ONCE = 1 << 26
"""Probabilities in memory at a time."""


def layer_masses(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    rows: QueryRows,
    layouts: Sequence[BlockLayout | HeadLayout],
    text_tokens: int = 0,
) -> dict[str, Tensor]:
    """What the attention of one layer's heads does, in one clip.

    Args:
        q, k: (video + text tokens, H, head_dim) after norms and rotary embedding.
        geometry: the bins.
        rows: the query rows that are looked at.
        layouts: patterns on the same grid, whose kept mass is wanted.
        text_tokens: valid text tokens; those after them are no keys.

    Returns:
        On the CPU, in the precision that the sums were made in:

        * ``mass`` (H, 2F - 1, A, A): of a query of tile a, the mass on all keys of tile b of the frame at signed
          distance d (index F - 1 + d), the mean over all frames that have one, the first as key left out;
        * ``sink`` (H, F, A, A): of a query of frame i and tile a, the mass on tile b of the first frame;
        * ``text_keys`` (H, A): of a query of tile a, the mass on text;
        * ``joint`` (G, H, D, S): mass at (temporal, spatial) distance, of queries and keys after the first frame;
        * ``temporal`` (G, H, 2, D - 1): a frame's mass at distance d and at d + 1, of the queries that have both;
        * ``spatial`` (G, H, 2, S - 1): the same of the mean probability at a spatial distance;
        * ``first`` and ``text`` (G, H): mass on the first frame and on text, of queries after the first frame; they
          and ``joint`` add up to 1;
        * ``kept`` (layouts, G, H): mass on the blocks that a pattern keeps, of all video queries;
        * ``text_rows`` (H, F + 1): of text queries, the mass on each frame and on text; zero without text.
    """
    grid = geometry.grid
    frames, per_frame, video = grid.frames, grid.tokens_per_frame, grid.video_tokens
    heads, dim, keys = q.shape[1], q.shape[2], video + text_tokens
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    at: dict[str, Any] = {"device": q.device, "dtype": work}
    tiles, reach, apart = geometry.tiles, geometry.reach, geometry.distances
    share, many = rows.share.to(**at), rows.replicates
    average = F.one_hot(rows.tile, tiles).T.to(**at)
    average /= average.sum(1, keepdim=True)
    in_tile = geometry.tile_matrix.to(**at)
    places = rows.places.to(q.device)
    found = {
        "mass": torch.zeros(heads, 2 * frames - 1, tiles, tiles, **at),
        "sink": torch.zeros(heads, frames, tiles, tiles, **at),
        "text_keys": torch.zeros(heads, tiles, **at),
        "joint": torch.zeros(many, heads, apart, reach, **at),
        "temporal": torch.zeros(many, heads, 2, apart - 1, **at),
        "spatial": torch.zeros(many, heads, 2, reach - 1, **at),
        "first": torch.zeros(many, heads, **at),
        "text": torch.zeros(many, heads, **at),
        "kept": torch.zeros(len(layouts), many, heads, **at),
        "text_rows": torch.zeros(heads, frames + 1, **at),
    }
    masks = [layout.mask().to(q.device) for layout in layouts]
    step = max(1, AT_ONCE // (len(rows.tile) * keys))
    for start in range(0, heads, step):
        own = slice(start, start + step)
        k_HDN = k[:keys, own].to(work).permute(1, 2, 0)

        def attention(index: Tensor, own: slice = own, k_HDN: Tensor = k_HDN) -> Tensor:
            """(H, rows, keys) probabilities of some query tokens."""
            q_HRD = q[index, own].to(work).transpose(0, 1)
            return (q_HRD * dim**-0.5 @ k_HDN).softmax(-1)

        for frame in range(frames):
            index = frame * per_frame + places[frame]
            p = attention(index)
            video_HRFS = p[..., :video].unflatten(2, (frames, per_frame))
            text_HR = p[..., video:].sum(-1)
            by_tile = video_HRFS @ in_tile
            tiled = torch.einsum("ar,hrfb->hfab", average, by_tile)
            found["mass"][own, frames - frame : 2 * frames - 1 - frame] += tiled[:, 1:]
            found["sink"][own, frame] = tiled[:, 0]
            found["text_keys"][own] += text_HR @ average.T / frames
            for number, (layout, mask) in enumerate(zip(layouts, masks, strict=True)):
                kept = _kept(p, index, layout, mask[own] if layout.by_head else mask)
                found["kept"][number, :, own] += (kept @ share).T / frames
            if frame:
                weights = share / (frames - 1)
                found["first"][:, own] += (by_tile[:, :, 0].sum(-1) @ weights).T
                found["text"][:, own] += (text_HR @ weights).T
                _add_temporal(found["temporal"][:, own], torch.einsum("rg,hrf->ghf", weights, by_tile.sum(-1)), frame)
                bins = geometry.spatial_bins(places[frame])
                _add_spatial(found["joint"][:, own], found["spatial"][:, own], video_HRFS, bins, weights, frame)
        if text_tokens:
            words = attention(torch.arange(video, keys, device=q.device)).mean(1)
            found["text_rows"][own, :frames] = words[:, :video].unflatten(1, (frames, per_frame)).sum(-1)
            found["text_rows"][own, frames] = words[:, video:].sum(-1)
    found["mass"] /= _pairs(frames).to(**at)[:, None, None]
    return {name: tensor.cpu() for name, tensor in found.items()}


def _kept(p: Tensor, index: Tensor, layout: BlockLayout | HeadLayout, mask: Tensor) -> Tensor:
    """(H, rows) the mass of (H, rows, keys) probabilities on the blocks that a layout keeps.

    Args:
        index: (rows,) the query tokens.
        mask: the layout's, (blocks, blocks), or with a head's masks before them.
    """
    orders = layout.orders(p.device)
    if orders is not None:  # blocks are of tokens in the pattern's own order
        order, inverse = orders
        p, index = F.pad(p, (0, layout.grid.tokens - p.shape[2]))[..., order], inverse[index]
    in_blocks = F.pad(p, (0, -p.shape[2] % layout.block)).unflatten(2, (-1, layout.block)).sum(-1)
    return (in_blocks * mask[..., index // layout.block, : in_blocks.shape[2]]).sum(-1)


def _pairs(frames: int) -> Tensor:
    """(2F - 1,): the pairs (query frame, later key frame than the first) at each signed distance, 1 where none is."""
    distance = torch.arange(1 - frames, frames)
    return torch.where(distance > 0, frames - distance, frames - 1 + distance).clamp(min=1)


def _add_temporal(chain: Tensor, mass_GHF: Tensor, frame: int) -> None:
    """Adds to both rows of the ``temporal`` chain what a frame's queries give to the frames around it."""
    for side in (mass_GHF[..., frame:], mass_GHF[..., 1 : frame + 1].flip(-1)):  # later ones, earlier ones
        steps = side.shape[-1] - 1
        chain[:, :, 0, :steps] += side[..., :-1]
        chain[:, :, 1, :steps] += side[..., 1:]


def _add_spatial(joint: Tensor, chain: Tensor, p_HRFS: Tensor, bins: Tensor, weights: Tensor, frame: int) -> None:
    """Adds a frame's queries to ``joint`` and to the ``spatial`` chain.

    Args:
        p_HRFS: (heads, rows, frames, tokens_per_frame) probabilities.
        bins: (rows, tokens_per_frame) the bin of each place of a frame, from each row's.
        weights: (rows, replicates).
        frame: of the queries.
    """
    heads, _, frames, _ = p_HRFS.shape
    reach = joint.shape[-1]
    in_bin = F.one_hot(bins, reach).to(p_HRFS)
    by_row = p_HRFS[:, :, 1:].transpose(0, 1).flatten(1, 2)  # (rows, heads x later frames, tokens_per_frame)
    mass = (by_row @ in_bin).unflatten(1, (heads, frames - 1))
    distance = (torch.arange(1, frames, device=bins.device) - frame).abs()
    joint.index_add_(2, distance, torch.einsum("rg,rhfb->ghfb", weights, mass))
    count = in_bin.sum(1)  # places of a frame in each bin, from each row's
    mean = mass.sum(2) / count.clamp(min=1)[:, None]
    both = (count[:, :-1] > 0) & (count[:, 1:] > 0)
    for side, part in enumerate((mean[..., :-1], mean[..., 1:])):
        chain[:, :, side] += torch.einsum("rg,rhb->ghb", weights, part * both[:, None])
