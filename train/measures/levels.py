"""The noise levels at which the loss on held-out clips is measured.

They are quantiles of those that the run trains at, so that the mean looks where training is: with Wan's shift of 5,
half of it lies above 0.83. Of two experts each has the quantiles of its own levels, and its share of the mean.
"""

from __future__ import annotations

from itertools import pairwise

from train.config.schema import RunConfig
from train.models.loading import sigma_range
from train.step.clip_recipe import clip_recipe

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


def validation_levels(config: RunConfig) -> dict[float, float]:
    """The noise levels at which a run is validated, from low to high, and the share that each has of the mean.

    They are ``validation.sigmas`` where these are set, without those of an expert that the run does not train.
    """
    low, high = sigma_range(config.model)
    if config.validation.sigmas is not None:
        given = sorted({sigma for sigma in config.validation.sigmas if low <= sigma < high})
        return {sigma: 1 / len(given) for sigma in given}
    schedule = clip_recipe(config).schedule
    edges = [low, high]
    if config.model.expert == "both":
        assert config.model.boundary is not None
        edges.insert(1, config.model.boundary)
    below = [1 - schedule.share_above(edge) for edge in edges]
    found: dict[float, float] = {}
    for start, end in pairwise(below):
        share = (end - start) / (below[-1] - below[0]) / len(QUANTILES)
        found |= {schedule.at_quantile(start + quantile * (end - start)): share for quantile in QUANTILES}
    return found
