"""Generating a latent with the model that is in training: Euler steps of the flow, by diffusers' scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

from train.attention.step import StepAttention
from train.config.schema import RunConfig
from train.errors import UserError
from train.models.base import ModelAdapter
from train.models.conditions import Conditions
from train.models.families import family_of

_STEPS, _GUIDANCE = 30, 5.0  # of a model that has none of its own


def sampled_with(config: RunConfig) -> tuple[int, float, float]:
    """Denoising steps of a run's generated clips, and the weights of guidance of its experts for high and for low noise
    levels, of one transformer the same twice: the run's, else the model's own."""
    own = config.model.guidance or [1.0 if family_of(config.model).distilled else _GUIDANCE]
    given = config.validation.samples_guidance
    weights = [given] if given else guidance_of_experts(config, own)
    return config.validation.samples_steps or config.model.steps or _STEPS, weights[0], weights[-1]


def guidance_of_experts(config: RunConfig, guidance: list[float]) -> list[float]:
    """Of a model's weights of guidance, that of high noise levels first, those of the experts that a run has."""
    return {"both": guidance, "low": guidance[-1:]}.get(config.model.expert or "", guidance[:1])


@torch.no_grad()
def generate(
    adapter: ModelAdapter,
    noise: Tensor,
    conditions: Conditions,
    empty: Conditions | None,
    attention: Callable[[float], StepAttention],
    *,
    steps: int,
    shift: float,
    guidance: float,
    guidance_low: float | None = None,
    label: str = "Sampling",
    quiet: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """Integrates the flow from noise to a clean latent.

    Args:
        noise: (batch, C, F, H, W) standard normal.
        conditions: the prompts' and all else that the model sees.
        empty: the same with the empty prompt; needed when guidance is not 1.
        attention: that of a step, from its noise level.
        steps: Euler steps.
        shift: the family's shift of the noise levels.
        guidance: classifier-free guidance weight; 1 is off and costs half.
        guidance_low: that of the expert for low noise levels; None is ``guidance``. One transformer has no use for it.
        label: of the progress bar.
        quiet: no progress bar.
        start: (batch, C, f, H, W) clean first frames that the clip goes on from: at each noise level the model sees
            them under that level's share of their own noise, as in training.

    Returns:
        The latent, float32, of the shape of ``noise``.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler()  # the library has no types
    scheduler.set_timesteps(sigmas=adapter.noise_levels(steps, shift), device=noise.device)
    if adapter.sigma_range != (0.0, 1.0):
        least, end = adapter.sigma_range
        raise UserError(f"the model is an expert for noise levels {least:g} to {end:g}: sample with model.expert=both")
    x = noise.float().clone()
    for step, timestep in enumerate(
        tqdm(scheduler.timesteps, desc=label, unit="step", dynamic_ncols=True, disable=quiet)
    ):
        level = scheduler.sigmas[step].float()
        sigma = level.expand(len(x))
        if start is not None:
            given = start.shape[2]
            x[:, :, :given] = (1 - level) * start + level * noise[:, :, :given]
        adapter.set_attention(attention(level.item()))
        velocity = adapter.velocity(x, sigma, conditions)
        low = adapter.boundary is not None and level.item() < adapter.boundary
        weight = guidance_low if low and guidance_low is not None else guidance
        if weight != 1.0:
            assert empty is not None, "guidance needs the empty prompt"
            unconditional = adapter.velocity(x, sigma, empty)
            velocity = unconditional + weight * (velocity - unconditional)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    if start is not None:
        x[:, :, : start.shape[2]] = start
    return x
