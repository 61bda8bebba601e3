"""Flow matching: noise levels, noised latents, velocity targets. Families that run time backwards (Mochi-1) are turned
round by their adapter.

    x_sigma = (1 - sigma) x0 + sigma eps        target v = eps - x0        sigma in (0, 1)

A base variable u in (0, 1) (uniform, or the sigmoid of a normal) is moved towards noise by the family's shift
(Esser et al. 2024, arXiv 2403.03206, eq. 23; diffusers' FlowMatchEulerDiscreteScheduler uses the same formula):

    sigma = shift u / (1 + (shift - 1) u)

Everything random is a pure function of (seed, step, sample), so that any number of ranks and any resume draw the same.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the key, for instance ``(seed, step, sample)``."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def shifted(u: float, shift: float) -> float:
    """A noise level in [0, 1] moved towards 1 by the shift (the module's formula)."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class SigmaSchedule:
    """The distribution of training noise levels.

    Args:
        shift: the family's shift (Wan2.1: 5.0 at 720p, 3.0 at 480p).
        density: ``uniform`` or ``logit_normal`` (of the base variable u).
        mean, std: of the normal behind ``logit_normal``.
    """

    shift: float = 1.0
    density: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def share_above(self, sigma: float) -> float:
        """Probability that a drawn noise level is at least ``sigma``."""
        u = sigma / (self.shift - (self.shift - 1) * sigma)
        if u <= 0 or u >= 1:
            return float(u <= 0)
        if self.density == "uniform":
            return 1 - u
        return 1 - NormalDist(self.mean, self.std).cdf(math.log(u / (1 - u)))

    def at_quantile(self, quantile: float) -> float:
        """The noise level below which a share ``quantile`` in (0, 1) of all draws lies."""
        quantile = min(max(quantile, 1e-6), 1 - 1e-6)
        u = quantile
        if self.density == "logit_normal":
            u = 1 / (1 + math.exp(-NormalDist(self.mean, self.std).inv_cdf(quantile)))
        return shifted(u, self.shift)


@dataclass(frozen=True)
class StepDraw:
    """What the step's own RNG decides: one side for the whole world, then a noise level for each sample."""

    dense: bool
    low: float
    high: float

    @classmethod
    def of(cls, seed: int, step: int, schedule: SigmaSchedule, dense_sigma: float | None) -> StepDraw:
        """Draws the side with its true probability: dense attention at noise levels from ``dense_sigma`` up.

        ``low`` and ``high`` are the quantiles of the schedule that belong to the side.
        """
        if dense_sigma is None:
            return cls(False, 0.0, 1.0)
        dense_share = schedule.share_above(dense_sigma)
        dense = torch.rand((), generator=generator_for(seed, step, "side")).item() < dense_share
        return cls(dense, 1 - dense_share, 1.0) if dense else cls(dense, 0.0, 1 - dense_share)

    def sigma(self, seed: int, step: int, sample: str, schedule: SigmaSchedule) -> float:
        """The noise level of one sample, within this step's side."""
        u = torch.rand((), generator=generator_for(seed, step, sample, "sigma")).item()
        return schedule.at_quantile(self.low + u * (self.high - self.low))


def noise_like(latent: Tensor, *key: object) -> Tensor:
    """Standard normal noise of the latent's shape, float32, a pure function of the key and the kind of device."""
    generator = generator_for(*key, "noise", device=latent.device)
    return torch.randn(latent.shape, generator=generator, device=latent.device)


def noised(latent: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The noised latent and the velocity target, float32.

    Args:
        latent, noise: (batch, C, F, H, W).
        sigma: (batch,).
    """
    latent = latent.float()
    level = sigma.view(-1, *[1] * (latent.dim() - 1)).to(latent)
    return (1 - level) * latent + level * noise, noise - latent
