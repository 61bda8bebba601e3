"""The mask of the public Radial Attention inference code (November 2025), block for block: the default.

A LoRA is only worth as much as the inference stacks that can run it. Query blocks that the public code leaves without a
key block of the video are filled by `radial.layout`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.bands import Bands, surviving_blocks
from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns.base import Pattern

RULES = ("wan", "hunyuan", "ports")
_THINNING = 128  # tokens; a constant of the released code, whatever the block size


@dataclass(frozen=True)
class Released(Pattern):
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
    parameter: ClassVar[str | None] = "decay"

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
        return surviving_blocks(bands, s, block, grid.video_tokens // block, strict=True)

    def bounds(self, grid: VideoGrid) -> tuple[float, float]:
        # from windows of one block at every distance to whole frames at every one
        return 2.0**-12, 2.0 * grid.frames


def _window(reach: float, tokens_per_frame: int) -> int:
    """The largest distance within ``reach``, at most a frame: torch compares whole numbers with a float in float32."""
    return int(torch.tensor(min(reach, float(tokens_per_frame)), dtype=torch.float32))
