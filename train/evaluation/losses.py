"""The flow loss on held-out clips, paired: the same clips, noise levels and noise for every variant."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from tqdm import tqdm

from data.shards.batch import collate
from data.shards.sample import Sample
from train.attention.step import StepAttention
from train.flow import SigmaSchedule, flow_loss, noise_like, noised
from train.models.base import ModelAdapter
from train.models.conditions import Conditions


@functools.cache
def student_95(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t with a whole number of degrees of freedom, at least 1.

    Found by bisection on the angle atan(t / sqrt(freedom)), in which the distribution is a finite sum (Abramowitz and
    Stegun, 26.7.3 and 26.7.4).
    """

    def inside(angle: float) -> float:
        """The probability of values nearer to 0 than the angle's."""
        cosine, odd = math.cos(angle), freedom % 2
        term, total = (cosine if odd else 1.0), 0.0
        for power in range(1 + odd, freedom, 2):
            total += term
            term *= cosine**2 * power / (power + 1)
        total *= math.sin(angle)
        return (angle + total) * 2 / math.pi if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its 95 % interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Student's t interval of independent values, two at least."""
        return cls(fmean(values), student_95(len(values) - 1) * stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


@torch.no_grad()
def clip_losses(
    adapter: ModelAdapter,
    clips: Sequence[Sample],
    attention: Callable[[Tensor, float], StepAttention],
    schedule: SigmaSchedule,
    *,
    seed: int,
    label: str,
) -> list[float]:
    """Flow loss of each clip, at noise levels spread evenly over the schedule's quantiles, with fixed noise.

    ``attention`` gives that of a noised latent at a noise level.
    """
    device = next(adapter.transformer.parameters()).device
    losses = []
    for index, clip in enumerate(tqdm(clips, desc=label, unit="clip", dynamic_ncols=True)):
        batch = collate([clip], 0).to(device)
        # a coprime stride, so that level and place in the set are unrelated
        quantile = ((index * 7) % len(clips) + 0.5) / len(clips)
        sigma = torch.tensor([schedule.at_quantile(quantile)], device=device)
        x, target = noised(batch.latent, noise_like(batch.latent, seed, "evaluation", clip.key), sigma)
        adapter.set_attention(attention(x, sigma.item()))
        conditions = Conditions.of(batch)
        velocity = adapter.velocity(x, sigma, conditions)
        losses.append(flow_loss(velocity, target, None, adapter.patch, adapter.given_frames(conditions)).item())
    return losses
