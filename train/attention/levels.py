"""The noise levels of a run's clips: how they are drawn, and from which on attention is dense.

A run says how many of its model's sampling steps are dense (``attention.dense_steps``). Training has no such steps, it
draws noise levels: dense from halfway between the last dense step's level and the next one's up, of the family's own
sampler with as many steps as the model is sampled with (``model.steps``) and the clip's shift. A sampler with another
number of steps keeps that level, at which training changed sides, and not the count.

Each clip has the shift of its own size: a step's clips are of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from train.config.schema import ClipConfig, ModelConfig, RunConfig
from train.flow import SigmaSchedule
from train.models.families import family_of


@dataclass(frozen=True)
class ClipLevels:
    """The noise levels of clips of one size.

    Attributes:
        schedule: the distribution that training draws from.
        dense_sigma: the level from which on attention is dense throughout; None: nowhere.
    """

    schedule: SigmaSchedule
    dense_sigma: float | None = None

    def dense(self, sigma: float) -> bool:
        """Whether attention is dense throughout at a noise level."""
        return self.dense_sigma is not None and sigma >= self.dense_sigma


def dense_level(model: ModelConfig, dense_steps: int, shift: float) -> float | None:
    """The noise level from which on attention is dense when the first steps of the model's sampler are; None for none.

    Args:
        model: with ``steps``, more than ``dense_steps`` (`train.config.check`).
    """
    if dense_steps == 0:
        return None
    assert model.steps is not None
    levels = family_of(model).noise_levels(model.steps, shift)
    return (levels[dense_steps - 1] + levels[dense_steps]) / 2


def clip_levels(config: RunConfig, clip: ClipConfig | None = None) -> ClipLevels:
    """The noise levels of a run's clips of a size, by default of the configured clip's.

    Raises:
        UserError: the model has no shift of its own where it is needed.
    """
    shift, attention, objective = config.shift(clip), config.attention, config.objective
    dense_sigma = attention.dense_sigma
    if dense_sigma is None:
        dense_sigma = dense_level(config.model, attention.dense_steps, shift)
    return ClipLevels(SigmaSchedule(shift, objective.density, objective.mean, objective.std), dense_sigma)


def levels_by_size(config: RunConfig) -> Callable[[Sequence[int]], ClipLevels]:
    """`clip_levels` by a latent's size in cells, (frames, height, width)."""

    @cache
    def levels(size: tuple[int, int, int]) -> ClipLevels:
        frames, height, width = config.model.vae
        clip = ClipConfig((size[0] - 1) * frames + 1, size[1] * height, size[2] * width)
        return clip_levels(config, clip)

    return lambda size: levels((size[0], size[1], size[2]))
