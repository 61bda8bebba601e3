"""The flow loss on held-out clips, paired: the same clips, noise levels and noise for every variant."""

from __future__ import annotations

import functools
import itertools
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
from train.step.objective import Objective


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
        """Student's t interval of independent values, two at least; not a number where one is not finite."""
        if not all(map(math.isfinite, values)):
            return cls(math.nan, math.nan)
        return cls(fmean(values), student_95(len(values) - 1) * stdev(values) / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


@torch.no_grad()
def clip_losses(
    adapter: ModelAdapter,
    clips: Sequence[Sample],
    attention: Callable[[Tensor, float], StepAttention],
    schedule: SigmaSchedule,
    objective: Objective,
    *,
    label: str,
) -> list[float]:
    """Flow loss of each clip, at noise levels spread evenly over the schedule's quantiles, with fixed noise.

    Args:
        attention: gives that of a noised latent at a noise level.
        objective: of the run: its seed, its guidance, and what its velocity is trained towards.
    """
    device = next(adapter.transformer.parameters()).device
    stride = next(step for step in itertools.count(7) if math.gcd(step, len(clips)) == 1)
    losses = []
    for index, clip in enumerate(tqdm(clips, desc=label, unit="clip", dynamic_ncols=True)):
        batch = objective.held_out(collate([clip], 0).to(device), clip.latent.shape[1])
        # a coprime stride: each clip has a level of its own, which its place in the set does not tell
        quantile = ((index * stride) % len(clips) + 0.5) / len(clips)
        sigma = torch.tensor([schedule.at_quantile(quantile)], device=device)
        x, target = noised(batch.latent, noise_like(batch.latent, objective.seed, "evaluation", clip.key), sigma)
        adapter.set_attention(attention(x, sigma.item()))
        conditions = Conditions.of(batch, objective.guidance)
        target = objective.target(adapter.transformer, target, batch, functools.partial(adapter.velocity, x, sigma))
        velocity = adapter.velocity(x, sigma, conditions)
        losses.append(flow_loss(velocity, target, None, adapter.patch, adapter.given_frames(conditions)).item())
    return losses


@torch.no_grad()
def loss_at(
    adapter: ModelAdapter,
    clip: Sample,
    frames: int,
    sigma: float,
    attention: Callable[[Tensor, float], StepAttention],
    objective: Objective,
) -> float:
    """Flow loss of the beginning of a clip at one noise level; the noise is a function of seed, clip and length.

    A shorter clip is the beginning of a longer one: the VAEs are causal in time, so its latents are the longer's first.

    Args:
        frames: latent frames from the clip's start.
        attention: gives that of a latent at a noise level; of ranks that share the tokens, each gets its share.
        objective: of the run: its seed, its guidance, and what its velocity is trained towards.
    """
    batch = objective.held_out(collate([clip], 0).to(next(adapter.transformer.parameters()).device), frames)
    latent = batch.latent[:, :, :frames]
    level = torch.tensor([sigma], device=latent.device)
    x, target = noised(latent, noise_like(latent, objective.seed, "validation", clip.key, frames), level)
    step = attention(latent, sigma)
    adapter.set_attention(step)

    def velocity(conditions: Conditions) -> Tensor:
        return adapter.velocity(x, level, conditions.first_frames(frames))

    target = objective.target(adapter.transformer, target, batch, velocity)
    conditions = Conditions.of(batch, objective.guidance)
    given = adapter.given_frames(conditions.first_frames(frames))
    return flow_loss(velocity(conditions), target, step.shard, adapter.patch, given).item()
