"""Fits masks to a model's heads: from the masses that ``python -m train.decay`` measured to a file of rules.

The masses are means over the file's noise levels. What a rule's bit is worth is the mass of its pairs in the mean, per
token of the key tile; what it costs is the number of its block pairs in a clip of the measured length. The bits of all
layers and heads together are taken from the most valuable down, until the part of the share that is fitted is used up.
So heads get as many blocks as their attention is wide. Bits of pairs that only clips of other lengths have, such as the
same tile of neighbouring frames at a scaled distance of 0, cost nothing and are taken down to the same value. The rest
of the share is drawn (`radial.patterns.fitted`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns.fitted import bit_of_pairs
from radial.patterns.head_masks import About, write
from radial.patterns.token_orders import frame_order

DRAWN_ROWS = 4
"""Query blocks, neighbours in their frames, that draw the same key blocks: read into a GPU's cache once for all."""
_STEPS = 30
"""Of Newton's method, which has converged long before, if ever: each is a few sums over the masses."""
_NEAR = 0.01
"""Of a head's mass; totals of fitted and measured masses that are further apart show that it has not converged."""


def fit(
    decay: Path,
    out: Path,
    *,
    share: float,
    coverage: float = 0.5,
    separable: bool = False,
    dense_layers: int = 2,
    seed: int = 0,
) -> About:
    """Fits the masks and writes them.

    Args:
        decay: ``decay.safetensors`` of ``python -m train.decay`` with ``tile=strip`` or ``tile=patch``.
        out: of the masks.
        share: of all blocks of a clip of the measured length that is kept, the mean over layers and heads.
        coverage: of the share, the part that is drawn.
        separable: fit to masses that fall off exponentially with both distances (`nearest_separable`); heads without
            such masses are fitted to their measured ones, and named in what is returned and written.
        dense_layers: so many of the first layers get no masks.
        seed: of the draw.

    Raises:
        RadialError: a file that is none or has other tiles, one that the masks would overwrite, or a share that is
            smaller than one block a row or above 1.
    """
    if not share <= 1:
        raise RadialError(f"share is {share:g}, expected at most 1: all of the blocks")
    if out.resolve() == decay.resolve():
        raise RadialError(f"out is {out}, the measured masses themselves: give the masks another name")
    from safetensors import SafetensorError, safe_open

    made = "expected decay.safetensors of python -m train.decay"
    try:
        with safe_open(decay, "pt") as file:
            facts = _facts(file)
            grid = VideoGrid(**facts["grid"])
            layers = tuple(layer for layer in facts["layers"] if layer >= dense_layers)
            order, block = _order(facts["tile"], decay)
            if not layers:
                raise RadialError(
                    f"{decay} has masses of layers {facts['layers']}, dense_layers={dense_layers} leaves none"
                )
            values = torch.stack([_values(file, facts["sigmas"], layer, grid, block) for layer in layers])
    except OSError as error:
        raise RadialError(f"{decay} cannot be read ({error.strerror or error}): {made}") from error
    except RadialError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise RadialError(f"{decay} is damaged, or no such file ({error}): {made}") from error
    about = About(
        order, block, grid.frames, grid.height, grid.width, layers, share, coverage, 0.0, seed, rows=DRAWN_ROWS
    )
    if separable:
        values, near = nearest_separable(values, about)
        others = tuple((layers[place], head) for place, head in (~near).nonzero().tolist())
        about = replace(about, separable=True, not_separable=others)
    rules, rate = chosen(values, about, grid)
    about = replace(about, rate=rate)
    write(rules, about, out)
    return about


def measured_clip(decay: Path) -> VideoGrid:
    """The grid of the clips that such a file's masses were measured on, their text included."""
    from safetensors import safe_open

    with safe_open(decay, "pt") as file:
        return VideoGrid(**_facts(file)["grid"])


def chosen(values: Tensor, about: About, grid: VideoGrid) -> tuple[Tensor, float]:
    """The rules, and the rate at which all other pairs are drawn.

    Args:
        values: (layers, heads, entries) float32, of each bit.
        about: what is wanted.
        grid: of the measured clips.

    Returns:
        (layers, heads, entries) bool, and a number from 0 to 1.

    Raises:
        RadialError: the share is smaller than what every mask keeps.
    """
    complete, blocks = grid.video_tokens // about.block, -(-grid.tokens // about.block)
    heads = values.shape[0] * values.shape[1]
    # the diagonal, and rows and columns of text and of a partial block, are kept whatever a rule has
    free = about.share * blocks**2 - (blocks**2 - complete**2) - complete
    if free < 0:
        least = (blocks**2 - complete**2 + complete) / blocks**2
        raise RadialError(
            f"share is {about.share:g}, expected at least {least:.3g}: a block a row, with the text and what "
            f"{grid.tokens:,} tokens leave over blocks of {about.block}"
        )
    bits = bit_of_pairs(about, grid, torch.device("cpu")).view(complete, complete)
    off_diagonal = ~torch.eye(complete, dtype=torch.bool)
    cost = torch.bincount(bits[off_diagonal], minlength=about.entries)
    worth = values.view(torch.int32)  # floats from 0 up are in the order of their bits

    def spent(least: int) -> int:
        return sum(int(((layer >= least) * cost).sum()) for layer in worth)

    low, high = 0, 2**31 - 1  # everything, nothing
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(middle) <= (1 - about.coverage) * free * heads else (middle, high)
    used = spent(high)
    others = heads * (complete**2 - complete) - used
    rate = (free * heads - used) / others if others else 0.0
    return (worth >= high) & (used > 0), rate  # where all is drawn, other lengths get no fitted pairs either


def nearest_separable(values: Tensor, about: About) -> tuple[Tensor, Tensor]:
    """The masses exp(c - alpha d - beta s) that are nearest to given ones: exponential in both distances.

    d is in frames, s in tokens between the middles of tiles; the first frame's mass is the mean over its tiles. c,
    alpha and beta are each head's, by Poisson regression: least deviance over all pairs of tiles in the clip. A head
    with mass at the largest distances only has no such masses, its rates have no bound: it keeps the given ones.

    Args:
        values: (layers, heads, entries) float32, finite, of each bit.
        about: whose bits they are.

    Returns:
        The same shape; and (layers, heads) bool, False where the given masses are kept.
    """
    frames, tiles = about.frames, about.tiles
    distance = torch.arange(1 - frames, frames).double()
    in_time, in_space = torch.broadcast_tensors(distance.abs()[:, None, None], tile_distances(about))
    terms = torch.stack([torch.ones_like(in_time), in_time, in_space], -1).flatten(0, 2)
    pairs = (frames - in_time).flatten()  # of frames at that distance
    mass = values.double().unflatten(-1, (2 * frames, tiles, tiles))
    measured = mass[:, :, :-1].flatten(2)
    logarithm = (measured + 1e-3 * measured.mean(-1, keepdim=True) + 1e-30).log()  # not of zero
    expected = logarithm.exp()
    for _ in range(_STEPS):
        normal = torch.einsum("lhn,np,nq->lhpq", pairs * expected, terms, terms)
        moments = torch.einsum("lhn,np->lhp", pairs * (expected * logarithm + measured - expected), terms)
        # a frame of one tile has no distance in space, and so no beta
        rates = torch.einsum("lhpq,lhq->lhp", torch.linalg.pinv(normal, hermitian=True), moments)
        logarithm = (rates @ terms.T).clamp(-100, 50)  # wider than masses are: rates without bound stay finite
        expected = logarithm.exp()
    total = (pairs * measured).sum(-1)
    near = ((pairs * expected).sum(-1) - total).abs() <= _NEAR * total  # equal where the deviance is least
    first = mass[:, :, -1:].mean((3, 4), keepdim=True).expand(-1, -1, 1, tiles, tiles)
    separable = torch.cat([expected.unflatten(-1, (-1, tiles, tiles)), first], 2).flatten(2).float()
    return torch.where(near[..., None], separable, values), near


def tile_distances(about: About) -> Tensor:
    """(tiles, tiles) float64: tokens between the middles of a frame's tiles."""
    places = frame_order(about.order, about.height, about.width, about.block)
    tile = torch.arange(len(places)) // about.block
    middles = torch.stack([places // about.width, places % about.width], 1).double()
    middles = torch.zeros(about.tiles, 2, dtype=torch.float64).index_add_(0, tile, middles)
    middles /= torch.bincount(tile)[:, None]
    return torch.cdist(middles, middles)


def _facts(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((file.metadata() or {})["about"])
    return found


def _values(file: Any, sigmas: list[float], layer: int, grid: VideoGrid, block: int) -> Tensor:
    """(heads, entries) the mean mass of each bit's pairs per token of the key tile."""
    place = torch.arange(grid.tokens_per_frame) // block
    total: Tensor | float = 0.0
    for sigma in sigmas:
        mass, sink = (file.get_tensor(f"sigma_{sigma:g}/layer_{layer}/{name}") for name in ("mass", "sink"))
        total = total + torch.cat([mass, sink.mean(1, keepdim=True)], 1)
    if not torch.as_tensor(total).isfinite().all():
        raise ValueError(f"masses of layer {layer} are not finite")
    return (total / len(sigmas) / torch.bincount(place)).flatten(1)


def _order(tile: str, decay: Path) -> tuple[str, int]:
    """The order of tokens in which the tiles follow each other, and the side of the blocks that are as long."""
    words, _, block = tile.rpartition(" of ")
    order = {"strips": "raster", "patches": "patches"}.get(words)
    if order is None:
        raise RadialError(
            f"{decay} has masses of tiles {tile}, expected strips or patches of as many tokens as a block: measure "
            "with tile=strip or tile=patch"
        )
    return order, int(block)
