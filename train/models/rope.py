"""Temporal rotary embedding past a model's own length.

Pair j of a token in latent frame p turns by the angle p theta_j. For a clip of F frames and a model trained on N < F:

    default       p theta_j           the model's own table, which goes on past the positions of its training
    riflex        p theta'_j          theta'_k = min(theta_k, 0.9 x 2 pi / F): the intrinsic frequency, number k counted
                                      from 1, goes round less than once in the clip, so that motion does not repeat; the
                                      others stay (arXiv 2502.15894, eq. 8, with the 0.9 of its authors' code)
    interpolate   p (N - 1) / (F - 1) theta_j          all positions lie where training had them (arXiv 2306.15595)

Clips of up to N frames keep the model's own positions. The angles are a function of F alone, the same for training and
sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from radial import VideoGrid
from train.config.schema import ROPE_KINDS
from train.errors import UserError


def geometric(theta: float, channels: int) -> Tensor:
    """The usual frequencies of ``channels`` channels: (channels / 2,) float64, radians a position, fastest first."""
    return theta ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)


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
        assert self.kind in ROPE_KINDS, self.kind

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

        Raises:
            UserError: the model has no frequency number `intrinsic`.
        """
        if self.kind == "riflex" and self.changes(frames):
            if self.intrinsic > len(own):
                raise UserError(f"rope=riflex slows frequency {self.intrinsic} of {len(own)} that the model has")
            own = own.clone()
            own[self.intrinsic - 1].clamp_(max=0.9 * 2 * math.pi / frames)  # it is slowed, never quickened
        return own

    def angles(self, own: Tensor, frames: int) -> Tensor:
        """The angle of each pair in each latent frame: (frames, pairs) float64; ``own`` as for `frequencies`."""
        return torch.outer(self.positions(frames), self.frequencies(own.double().cpu(), frames))

    def extend(self, tables: tuple[Tensor, Tensor], own: Tensor, grid: VideoGrid) -> tuple[Tensor, Tensor]:
        """A model's tables of cosines and sines with the temporal channels of this clip.

        Args:
            tables: cosines and sines, each of video tokens x channels with any dimensions of size 1 beside; a head's
                temporal channels come first, each angle twice.
            own: as for `frequencies`.
            grid: of the clip.
        """
        if not self.changes(grid.frames):
            return tables
        angles = self.angles(own, grid.frames).repeat_interleave(grid.tokens_per_frame, 0).repeat_interleave(2, 1)

        def extended(table: Tensor, turned: Tensor) -> Tensor:
            rest = table.reshape(grid.video_tokens, -1)[:, turned.shape[1] :]
            return torch.cat([turned.to(table), rest], dim=1).view(table.shape)

        return extended(tables[0], angles.cos()), extended(tables[1], angles.sin())
