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
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from train.attention.sequence import SequenceShard


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

    def sides(self, dense_sigma: float | None, within: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float, float]:
        """Quantiles of the lowest noise level, of ``dense_sigma``, and of the highest: attention is dense between the
        second and the third, which are the same where ``dense_sigma`` is None.

        Args:
            within: the range of noise levels, from the first up to below the second.
        """
        low, high = (1 - self.share_above(sigma) for sigma in within)
        return low, high if dense_sigma is None else min(max(1 - self.share_above(dense_sigma), low), high), high

    def dense_share(self, dense_sigma: float | None, within: tuple[float, float] = (0.0, 1.0)) -> float:
        """Share of the draws within a range of noise levels at which attention is dense (`sides`)."""
        low, edge, high = self.sides(dense_sigma, within)
        return (high - edge) / (high - low)

    def at_quantile(self, quantile: float) -> float:
        """The noise level below which a share ``quantile`` in (0, 1) of all draws lies."""
        quantile = min(max(quantile, 1e-6), 1 - 1e-6)
        u = quantile
        if self.density == "logit_normal":
            u = 1 / (1 + math.exp(-NormalDist(self.mean, self.std).inv_cdf(quantile)))
        return shifted(u, self.shift)


@dataclass(frozen=True)
class StepDraw:
    """The random draw of one step: dense or sparse attention, the same on all ranks, then each sample's noise level."""

    dense: bool
    low: float
    high: float
    within: tuple[float, float] = (0.0, 1.0)

    @classmethod
    def of(
        cls,
        seed: int,
        step: int,
        schedule: SigmaSchedule,
        dense_sigma: float | None,
        within: tuple[float, float] = (0.0, 1.0),
    ) -> StepDraw:
        """Draws the side with its true probability: dense attention at noise levels from ``dense_sigma`` up.

        ``low`` and ``high`` are the quantiles of the schedule that belong to the side; ``within`` is the range of noise
        levels, from the first up to below the second, that the model of this step is for.
        """
        low, edge, high = schedule.sides(dense_sigma, within)
        drawn = torch.rand((), generator=generator_for(seed, step, "side")).item()
        dense = drawn < schedule.dense_share(dense_sigma, within)
        return cls(True, edge, high, within) if dense else cls(False, low, edge, within)

    def sigma(self, seed: int, step: int, sample: str, schedule: SigmaSchedule) -> float:
        """The noise level of one sample, within this step's side."""
        u = torch.rand((), generator=generator_for(seed, step, sample, "sigma")).item()
        level = schedule.at_quantile(self.low + u * (self.high - self.low))
        # rounding to float32 must not take it across a boundary, where another model is
        first, end = (np.float32(bound) for bound in self.within)
        return float(np.clip(level, first, np.nextafter(end, np.float32(0))))


def expert_range(seed: int, step: int, schedule: SigmaSchedule, boundary: float) -> tuple[float, float]:
    """The noise levels of the expert that the whole world trains in an optimizer step, drawn with its true share."""
    noisy = torch.rand((), generator=generator_for(seed, step, "expert")).item() < schedule.share_above(boundary)
    return (boundary, 1.0) if noisy else (0.0, boundary)


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


def flow_loss(
    velocity: Tensor, target: Tensor, shard: SequenceShard | None, patch: Sequence[int], given: int = 0
) -> Tensor:
    """Mean squared error, or with a shard the rank's share of it: (S / cells of a sample) x the sum over its own.

    The mean of the group's losses is the sample's loss.

    Args:
        velocity, target: (batch, C, F, H, W), whole on every rank.
        patch: size of a token in latent cells, (t, h, w).
        given: latent frames at the start that do not count.
    """
    if shard is None:
        return F.mse_loss(velocity[:, :, given:], target[:, :, given:])
    own = shard.own_cells(target.shape[2:], patch, target.device)
    return shard.group.size * ((velocity - target).square() * own)[:, :, given:].mean()
