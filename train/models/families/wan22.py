"""Wan2.2-TI2V-5B: Wan2.1's transformer with a VAE of 48 channels and 4x16x16 cells, for text- and image-to-video.

It goes on from an image when it is given a clip's first latent frame: those tokens are clean, their timestep is 0, and
what the model gives for them is not used. (Wan2.2-A14B is two transformers of Wan2.1's kind: `train.models.experts`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.models.conditions import Conditions
from train.models.families.wan import WanAdapter


class Wan5BAdapter(WanAdapter):
    """Adapter of Wan2.2-TI2V-5B."""

    family = "wan22_5b"
    takes_first_frame = True

    def given_frames(self, conditions: Conditions) -> int:
        first = conditions.image.get("first_frame")
        return 0 if first is None else first.shape[2]

    def velocity(self, x: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        given = self.given_frames(conditions)
        if not given:
            return super().velocity(x, sigma, conditions)
        first, rest = conditions.image["first_frame"].to(x), x[:, :, given:]
        grid = self.grid(x)
        timestep = (1000 * sigma)[:, None].repeat(1, grid.tokens)
        timestep[:, : given // self.patch[0] * grid.tokens_per_frame] = 0
        out = self.predict(torch.cat([first, rest], dim=2), timestep, conditions)
        # straight to the given frames, so that a sampler arrives at them
        level = sigma.view(-1, 1, 1, 1, 1).to(x)
        return torch.cat([((x[:, :, :given] - first) / level).float(), out[:, :, given:]], dim=2)
