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


def sampled_with(config: RunConfig) -> tuple[int, float]:
    """Denoising steps and the weight of guidance of a run's generated clips: the run's, else the model's own."""
    own = config.model.guidance or [1.0 if family_of(config.model).distilled else _GUIDANCE]
    guidance = config.validation.samples_guidance or own[-1 if config.model.expert == "low" else 0]
    return config.validation.samples_steps or config.model.steps or _STEPS, guidance


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
        if guidance != 1.0:
            assert empty is not None, "guidance needs the empty prompt"
            unconditional = adapter.velocity(x, sigma, empty)
            velocity = unconditional + guidance * (velocity - unconditional)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    if start is not None:
        x[:, :, : start.shape[2]] = start
    return x
