"""Temporal rotary embedding past a model's own length.

Pair j of a token in latent frame p turns by the angle p theta_j. For a clip of F frames and a model trained on N < F:

    default       p theta_j           the model's own table, which goes on past the positions of its training
    riflex        p theta'_j          theta'_k = 0.9 x 2 pi / F: the intrinsic frequency, number k counted from 1, goes
                                      round less than once in the clip, so that motion does not repeat; the others stay
                                      (arXiv 2502.15894, eq. 8, with the 0.9 of its authors' code)
    interpolate   p (N - 1) / (F - 1) theta_j          all positions lie where training had them (arXiv 2306.15595)

Clips of up to N frames keep the model's own positions. The angles are a function of F alone, the same for training and
sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("default", "riflex", "interpolate")


@dataclass(frozen=True)
class TemporalRope:
    """How a model's temporal positions go on past its own length.

    Attributes:
        kind: ``default``, ``riflex`` or ``interpolate``.
        native_frames: latent frames of the clips that the model was trained on.
        intrinsic: RIFLEx's k, counted from 1.
    """

    kind: str = "default"
    native_frames: int = 1
    intrinsic: int = 1

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def changes(self, frames: int) -> bool:
        """Whether a clip of that many latent frames has other angles than the model's own."""
        return self.kind != "default" and frames > self.native_frames

    def positions(self, frames: int) -> Tensor:
        """The position of each latent frame: (frames,) float64."""
        positions = torch.arange(frames, dtype=torch.float64)
        if self.kind == "interpolate" and self.changes(frames):
            positions *= (self.native_frames - 1) / (frames - 1)
        return positions

    def frequencies(self, own: Tensor, frames: int) -> Tensor:
        """The temporal frequencies of a clip.

        Args:
            own: (pairs,) radians a frame, those of the model, fastest first.
        """
        if self.kind == "riflex" and self.changes(frames):
            own = own.clone()
            own[self.intrinsic - 1] = 0.9 * 2 * math.pi / frames
        return own

    def angles(self, own: Tensor, frames: int) -> Tensor:
        """The angle of each pair in each latent frame: (frames, pairs) float64; ``own`` as for `frequencies`."""
        return torch.outer(self.positions(frames), self.frequencies(own.double().cpu(), frames))
