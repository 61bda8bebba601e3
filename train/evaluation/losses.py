"""The flow loss on held-out clips, paired: the same clips, noise levels and noise for every variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from data.shards.batch import collate
from data.shards.sample import Sample
from train.attention.sequence import flow_loss
from train.attention.step_plan import AttentionPlan
from train.flow import SigmaSchedule, noise_like, noised
from train.models.base import ModelAdapter
from train.models.conditions import Conditions


def student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t, within 0.1 % from 8 degrees of freedom on.

    The expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    z = NormalDist().inv_cdf(0.975)
    terms = [z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384]
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its 95 % interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t interval of independent values, nine at least."""
        return cls(fmean(values), student_95(len(values) - 1) * stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


@torch.no_grad()
def clip_losses(
    adapter: ModelAdapter,
    clips: Sequence[Sample],
    plan: Callable[[Tensor, float], AttentionPlan],
    schedule: SigmaSchedule,
    *,
    seed: int,
    label: str,
) -> list[float]:
    """Flow loss of each clip, at noise levels spread evenly over the schedule's quantiles, with fixed noise.

    ``plan`` gives the attention of a noised latent at a noise level.
    """
    device = next(adapter.transformer.parameters()).device
    losses = []
    for index, clip in enumerate(tqdm(clips, desc=label, unit="clip", dynamic_ncols=True)):
        batch = collate([clip], 0).to(device)
        # a coprime stride, so that the level says nothing of the place in the set
        quantile = ((index * 7) % len(clips) + 0.5) / len(clips)
        sigma = torch.tensor([schedule.at_quantile(quantile)], device=device)
        x, target = noised(batch.latent, noise_like(batch.latent, seed, "evaluation", clip.key), sigma)
        adapter.set_plan(plan(x, sigma.item()))
        conditions = Conditions.of(batch)
        velocity = adapter.velocity(x, sigma, conditions)
        losses.append(flow_loss(velocity, target, None, adapter.patch, adapter.given_frames(conditions)).item())
    return losses
