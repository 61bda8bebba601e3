"""What clips of one size are trained with: how their noise levels are drawn, and their attention.

A run sets how many of its model's sampling steps are dense (``attention.dense_steps``). Training has no such steps,
it draws noise levels: dense from halfway between the last dense step's level and the next one's up, of the family's own
sampler with as many steps as the model is sampled with (``model.steps``) and the clip's shift. A sampler with another
number of steps keeps that level, at which training changed sides, and not the count.

Each clip has the shift of its own size: a step's clips are of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from train.attention.recipe import AttentionRecipe
from train.config.schema import ClipConfig, ModelConfig, RunConfig
from train.errors import UserError
from train.flow import SigmaSchedule
from train.models.families import family_of
from train.models.loading import sigma_range


@dataclass(frozen=True)
class ClipRecipe:
    """What clips of one size are trained with.

    Attributes:
        schedule: the distribution of their noise levels.
        attention: with the noise level from which on all layers are dense.
    """

    schedule: SigmaSchedule
    attention: AttentionRecipe


class Recipes:
    """A run's `ClipRecipe` by the size of the clip.

    Attributes:
        own: of the configured clip.

    Raises:
        UserError: the model has no shift of its own where it is needed.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._of: dict[tuple[int, ...], ClipRecipe] = {}
        self.own = clip_recipe(config)

    def at(self, size: Sequence[int]) -> ClipRecipe:
        """The recipe of clips whose latents have so many frames, rows and columns."""
        key = tuple(size)
        if key not in self._of:
            model = self._config.model
            clip = ClipConfig(model.time.frames(size[0]), size[1] * model.vae[1], size[2] * model.vae[2])
            self._of[key] = clip_recipe(self._config, clip)
        return self._of[key]


def clip_recipe(config: RunConfig, clip: ClipConfig | None = None) -> ClipRecipe:
    """The recipe of a run's clips of a size, by default of the configured clip's.

    Raises:
        UserError: the model has no shift of its own where it is needed.
    """
    shift, attention, objective = config.shift(clip), config.attention, config.objective
    dense_sigma = attention.dense_sigma
    if dense_sigma is None:
        dense_sigma = dense_level(config.model, attention.dense_steps, shift)
    schedule = SigmaSchedule(shift, objective.density, objective.mean, objective.std)
    return ClipRecipe(schedule, AttentionRecipe.of(config, dense_sigma))


def check_expert(config: RunConfig) -> None:
    """Refuses one of two experts whose noise levels the density does not draw.

    Raises:
        UserError: naming the levels and the keys.
    """
    objective, bounds = config.objective, sigma_range(config.model)
    low, _, high = clip_recipe(config).schedule.sides(None, bounds)
    if high - low < 1e-6:  # quantiles nearer than this to 0 or 1 are not drawn
        raise UserError(
            f"model.expert={config.model.expert} trains noise levels from {bounds[0]:g} to {bounds[1]:g}, but "
            f"objective.mean={objective.mean:g} and std={objective.std:g} draw none there: change them or the expert"
        )


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
