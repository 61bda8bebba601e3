"""Static attention patterns: which block pairs of a video grid attend to each other.

A pattern is a small frozen object without any knowledge of kernels. It answers one question, `video_blocks`, for the
video part of a grid; `radial.layout` adds text, partial blocks and the block lists that kernels read.

* `Released`: the mask of the public Radial Attention inference code (2025-11), block for block. The default, because
  a LoRA is only worth as much as the inference stacks that can run it. Query blocks that it leaves without a key block
  of the video are filled by `radial.layout`.
* `Paper`: Eq. 4 of arXiv 2506.19852, covered by blocks.
* `Random`: as many blocks as the released mask, drawn at random: the floor that a mask has to beat.
* `Dense`: everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from radial.bands import Bands, surviving_blocks
from radial.errors import RadialError
from radial.grid import VideoGrid

RULES = ("wan", "hunyuan", "ports")
_THINNING = 128  # tokens; a constant of the released code, whatever the block size


class Pattern(Protocol):
    """A static choice of block pairs. Implementations are frozen, hashable dataclasses (layouts are cached by them)."""

    name: ClassVar[str]

    def __hash__(self) -> int: ...

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        """Kept pairs among the ``grid.video_tokens // block`` complete blocks of the video.

        Returns:
            int64 vector of ``row * complete_blocks + column``, ascending, without repeats.
        """
        ...

    def token_order(self, grid: VideoGrid) -> Tensor | None:
        """Permutation of the video tokens that the pattern's blocks assume, or None for raster order.

        Entry ``p`` names the raster token at position ``p``. It is applied once where the model's tokens enter the
        transformer blocks (RoPE with them) and undone where they leave.
        """
        ...


@dataclass(frozen=True)
class Released:
    """The mask of the public inference code.

    For a frame pair at distance d, with s tokens a frame and P the smallest power of two above s:

    * window: the whole frame for d <= 1, else |k - l| <= max(P / 2^bits(d) * decay, B), bits(d) = d.bit_length(),
      compared in float32, as the public code compares it;
    * thinning: with u = P / 2^bits(d) < 128, only distances that ``128 // u`` divides are kept;
    * sink: key frame 0 is always whole (rules ``wan`` and ``ports``);
    * reduction to B x B blocks by the 60 % / one-third rule (`radial.bands.surviving_blocks`).

    Args:
        decay: the public code's ``decay_factor``; 1.0 for 2x and 4x lengths, below 1 is sparser.
        rule: ``wan`` (sink, whole frame at d = 1): the public code's for Wan. ``hunyuan`` (no sink): the public code's
            for HunyuanVideo. ``ports`` (sink, half a frame at d = 1): an earlier form of the public code, which
            LightX2V, Wan2GP and, at blocks of 128, WanVideoWrapper run. At blocks of 64 WanVideoWrapper thins from 64
            tokens on, and ComfyUI-RadialAttn keeps more blocks (the corners of each frame pair) and counts a frame's
            tokens after padding: no rule is theirs.

    Raises:
        RadialError: an unknown rule, or a decay that is not a positive finite number.
    """

    decay: float = 1.0
    rule: str = "wan"
    name: ClassVar[str] = "released"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise RadialError(f"rule is {self.rule!r}, expected one of {', '.join(RULES)}")
        if not (isinstance(self.decay, (int, float)) and math.isfinite(self.decay) and self.decay > 0):
            raise RadialError(f"decay is {self.decay!r}, expected a positive number such as 1.0")

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        s, frames = grid.tokens_per_frame, grid.frames
        power = 2 ** s.bit_length()
        parts: list[Bands] = []
        for distance in range(frames):
            reach = power / 2 ** distance.bit_length()
            if reach < _THINNING and distance % int(_THINNING / reach):
                continue
            if distance <= 1:
                width = s // 2 if distance == 1 and self.rule == "ports" else s
            else:
                width = _window(max(reach * self.decay, block), s)
            parts.append(Bands.at_distance(frames, distance, width))
        bands = Bands.join(parts)
        if self.rule != "hunyuan":
            every = torch.arange(frames)
            others = bands.key != 0
            sink = Bands(every, torch.zeros_like(every), torch.full_like(every, s))
            bands = Bands.join([Bands(bands.query[others], bands.key[others], bands.width[others]), sink])
        return _complete(bands, grid, block, strict=True)

    def token_order(self, grid: VideoGrid) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Paper:
    """Eq. 4 of the paper: with r = floor(log2 max(d, 1)), token (i, k) attends to (j, l) iff

    2^r <= s and |k - l| + 1 <= s / 2^r,  or  d mod ceil(2^r / s) = 0 and k = l,  or  j = 0.

    Kernels work on blocks, so a block is kept when it holds at least one such pair: nothing the paper keeps is lost.
    """

    name: ClassVar[str] = "paper"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        s, frames = grid.tokens_per_frame, grid.frames
        parts: list[Bands] = []
        for distance in range(frames):
            reach = 1 << (max(distance, 1).bit_length() - 1)
            if reach <= s:
                parts.append(Bands.at_distance(frames, distance, s // reach - 1))
            elif distance % -(-reach // s) == 0:
                parts.append(Bands.at_distance(frames, distance, 0))
        every = torch.arange(frames)
        parts.append(Bands(every, torch.zeros_like(every), torch.full_like(every, s)))
        return _complete(Bands.join(parts), grid, block, strict=False)

    def token_order(self, grid: VideoGrid) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Random:
    """As many block pairs as the released mask keeps, drawn uniformly: the floor that any choice of blocks has to beat.

    One draw for all layers and heads, the same for the same grid and block size.

    Args:
        like: whose number of blocks it takes.
        seed: draws the blocks.
    """

    like: Released
    seed: int = 0
    name: ClassVar[str] = "random"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        count = len(self.like.video_blocks(grid, block))
        generator = torch.Generator().manual_seed(self.seed)
        every = torch.randperm((grid.video_tokens // block) ** 2, generator=generator)
        return every[:count].sort().values

    def token_order(self, grid: VideoGrid) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Dense:
    """Every token attends to every token: ordinary attention, the baseline and the choice for noisy steps."""

    name: ClassVar[str] = "dense"

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        return torch.arange((grid.video_tokens // block) ** 2)

    def token_order(self, grid: VideoGrid) -> Tensor | None:
        return None


def make_pattern(name: str, *, decay: float = 1.0, rule: str = "wan") -> Pattern:
    """The pattern of that name; ``decay`` and ``rule`` say which released mask it is, or has as many blocks as
    (``random``); for the others they have to be valid all the same.

    Raises:
        RadialError: an unknown name, or a value that ``released`` refuses.
    """
    released = Released(decay=decay, rule=rule)
    others: dict[str, Pattern] = {Paper.name: Paper(), Random.name: Random(released), Dense.name: Dense()}
    if name == Released.name:
        return released
    if name not in others:
        raise RadialError(f"pattern is {name!r}, expected one of {', '.join([Released.name, *others])}")
    return others[name]


def _window(reach: float, tokens_per_frame: int) -> int:
    """The largest distance within ``reach``, at most a frame: torch compares whole numbers with a float in float32."""
    return int(torch.tensor(min(reach, float(tokens_per_frame)), dtype=torch.float32))


def _complete(bands: Bands, grid: VideoGrid, block: int, *, strict: bool) -> Tensor:
    """Blocks of the bands on the complete blocks of the video."""
    return surviving_blocks(bands, grid.tokens_per_frame, block, grid.video_tokens // block, strict=strict)
