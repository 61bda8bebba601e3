"""Masks of heads whose attention falls off at known rates: for benchmarks, where no model's attention is at hand.

A head's attention is exp(-alpha d - beta s) at d frames and s tokens of distance, s between the middles of tiles, on
frames after the first. Heads go in equal steps, on a logarithmic scale, from spatial ones, which see all of the near
frames, to temporal ones, which see the same place in all frames; in every other one the first frame holds a fifth of
the mass, in the others none.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from radial.fit import DRAWN_ROWS, chosen, tile_distances
from radial.grid import VideoGrid
from radial.patterns.fitted import Fitted
from radial.patterns.head_masks import About, HeadMasks, packed, write

ALPHA = (1.0, 0.01)
"""A frame of latents, of the most spatial head and the most temporal one."""
BETA = (0.01, 0.5)
"""A token, of the most spatial head and the most temporal one."""
_SINK = 0.2


def known_pattern(grid: VideoGrid, heads: int, share: float) -> Fitted:
    """Masks that are fitted to such heads of one layer, in patches, half of them drawn.

    Args:
        grid: of the clip.
        heads: of the layer.
        share: of all blocks, the mean over heads.

    Raises:
        RadialError: a share that is smaller than one block a row.
    """
    rules, about = _fitted(grid, heads, 1, share, 0.5, 0)
    bits = packed(rules)
    content = json.dumps(asdict(about)).encode() + bits.numpy().tobytes()
    return Fitted(HeadMasks(bits, about, hashlib.sha256(content).hexdigest()))


def fit_known(
    grid: VideoGrid, out: Path, *, heads: int, layers: int, share: float, coverage: float, seed: int = 0
) -> None:
    """Writes masks that are fitted to such heads, the same kinds in every layer, in patches; errors as above."""
    write(*_fitted(grid, heads, layers, share, coverage, seed), out)


def _fitted(grid: VideoGrid, heads: int, layers: int, share: float, coverage: float, seed: int) -> tuple[Tensor, About]:
    size, numbers = (grid.frames, grid.height, grid.width), tuple(range(layers))
    about = About("patches", 128, *size, numbers, share, coverage, 0.0, seed, rows=DRAWN_ROWS)
    rules, rate = chosen(torch.stack([_values(about, heads)] * layers), about, grid)
    return rules, replace(about, rate=rate)


def _values(about: About, heads: int) -> Tensor:
    """(heads, entries) float32: mass per key token; that of all distances adds up to 1 in the mean over tiles."""
    frames, tiles = about.frames, about.tiles
    places = about.height * about.width
    size = torch.bincount(torch.arange(places) // about.block).double()
    apart = tile_distances(about)
    distance = torch.arange(1 - frames, frames).abs().double()
    found = []
    for head in range(heads):
        part = head / max(1, heads - 1)
        alpha, beta = (first ** (1 - part) * last**part for first, last in (ALPHA, BETA))
        sink = _SINK if head % 2 else 0.0
        mass = torch.exp(-alpha * distance[:, None, None] - beta * apart)
        mass *= (1 - sink) / (mass * size).sum((0, 2)).mean()
        first = torch.full((1, tiles, tiles), sink / places, dtype=torch.float64)
        found.append(torch.cat([mass, first]).flatten())
    return torch.stack(found).float()
