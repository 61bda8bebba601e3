"""UltraViCo's decay of attention beyond the window that a model was trained on (arXiv 2511.20123)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns.base import Pattern, check_positive


@dataclass(frozen=True)
class UltraViCo(Pattern):
    """Dense attention whose scores beyond the native window are multiplied by a constant: needs no training.

    With s the tokens of a frame and W = ``reach`` the frames that the model was made for, the score S(i, j) = scale q_i
    k_j of video tokens becomes, as in the authors' kernel for Wan,

        factor S(i, j)      where |i - j| > s W / 2 and S(i, j) > 0
        left out            where i <= s and j > s W: the first frame does not look past the window
        S(i, j)             elsewhere

    A negative score stays, since the factor would raise it. The factor is of the score and not of the weight after the
    softmax, so it is no constant bias: two passes merged by their log-sum-exp are not the same, and no kernel here has
    it. `radial.scaled_scores` computes it in plain torch: the operations of dense attention, without a kernel's speed.

    It is no choice of blocks, and so none of `radial.patterns.PATTERNS`: a LoRA is not trained under it.

    Args:
        reach: W, latent frames of the model's own length.
        factor: of the scores beyond the window, above 0 and at most 1.

    Raises:
        RadialError: a value that is not possible.
    """

    reach: float
    factor: float = 0.9
    name: ClassVar[str] = "ultravico"

    def __post_init__(self) -> None:
        check_positive(self.name, "reach", self.reach)
        check_positive(self.name, "factor", self.factor)
        if self.factor > 1:
            raise RadialError(f"factor of pattern {self.name} is {self.factor}, expected at most 1")

    def video_blocks(self, grid: VideoGrid, block: int) -> Tensor:
        return torch.arange((grid.video_tokens // block) ** 2)
