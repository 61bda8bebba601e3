"""The findings in words, and the cheapest setting whose velocity stays near dense's.

The model is as it is: a LoRA that is trained under a mask takes most of these errors back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from radial import VideoGrid
from train.decay.kept import attention_of, dense_attention
from train.decay.results import LayerFigures, Velocity
from train.decay.settings import Job
from train.models.loading import sigma_range

GOOD_FIT = 0.9
"""R² from which on a curve counts as an exponential decay; the paper reports 0.985 and more for HunyuanVideo."""
_NAMED = 8  # heads that are listed by number


@dataclass(frozen=True)
class Setting:
    """A pattern with its dense layers and dense noise levels.

    Attributes:
        dense_sigma: the noise level from which on all layers are dense; None: nowhere.
        dense_steps: of the model's sampler, at and above that level, of both experts; None: the model has no sampling
            steps of its own.
        error: the largest mean error of the velocity at a measured noise level that is not dense.
        attention: FLOPs of self-attention in a forward, the mean over the sampler's steps, of an expert over its own.
        attention_share, share: of dense attention's FLOPs, and of a dense forward's.
    """

    pattern: str
    dense_layers: int
    dense_sigma: float | None
    dense_steps: int | None
    error: float
    attention: float
    attention_share: float
    share: float


def settings(
    job: Job,
    velocities: Sequence[Velocity],
    grid: VideoGrid,
    shape: tuple[int, int, int],
    linear_flops: float,
    levels: Sequence[float],
) -> list[Setting]:
    """Every pattern and number of dense layers, with as many noise levels dense as keep the error, cheapest first.

    Noise levels go dense from the highest down. Those between two measured ones follow the nearer. Where even the
    lowest measured level is over the bound, nothing but dense attention would keep it, and the pattern is left out.

    Args:
        shape: layers, heads and head_dim of self-attention.
        linear_flops: of a forward outside self-attention.
        levels: of the sampler's steps.
    """
    low, high = sigma_range(job.config.model)  # without its upper end, unless that is pure noise
    own_levels = [level for level in levels if low <= level and (level < high or high == 1)] or levels
    dense = dense_attention(grid).attention_flops(*shape)
    found = []
    for candidate in job.candidates:
        for dense_layers in job.dense_layers:
            errors = {
                v.sigma: v.mean for v in velocities if (v.pattern, v.dense_layers) == (candidate.name, dense_layers)
            }
            over = [sigma for sigma, error in errors.items() if not error <= job.error]  # it may be no number
            bad, good = min(over, default=None), max(errors)
            if bad is not None:
                under = [sigma for sigma in errors if sigma < bad]
                if not under:
                    continue
                good = max(under)
            dense_sigma = None if bad is None else (good + bad) / 2
            is_dense = replace(candidate.recipe, dense_sigma=dense_sigma).is_dense
            part = sum(map(is_dense, own_levels)) / len(own_levels)
            own = attention_of(candidate, grid, dense_layers).attention_flops(*shape)
            attention = part * dense + (1 - part) * own
            found.append(
                Setting(
                    candidate.name,
                    dense_layers,
                    dense_sigma,
                    None if job.config.model.steps is None else sum(map(is_dense, levels)),
                    max(error for sigma, error in errors.items() if sigma <= good),
                    attention,
                    attention / dense,
                    (attention + linear_flops) / (dense + linear_flops),
                )
            )
    return sorted(found, key=lambda setting: setting.attention)


def advice(
    job: Job, figures: Sequence[LayerFigures], velocities: Sequence[Velocity], found: Sequence[Setting]
) -> list[str]:
    """Sentences, each with its figures."""
    return [
        _decays(figures),
        _others(figures),
        _kinds(figures),
        *_keeps(job, figures),
        *_settings(job, velocities, found),
    ]


def decaying(figures: LayerFigures) -> torch.Tensor:
    """(heads,) bool: whether attention falls exponentially with both distances."""
    in_time = (figures.alpha.mean > 0) & (figures.alpha_fit.r2 >= GOOD_FIT)
    in_space = (figures.beta.mean > 0) & (figures.beta_fit.r2 >= GOOD_FIT)
    return in_time & in_space


def _decays(figures: Sequence[LayerFigures]) -> str:
    flags = torch.cat([decaying(one) for one in figures])
    in_time = torch.cat([(one.alpha.mean > 0) & (one.alpha_fit.r2 >= GOOD_FIT) for one in figures])
    in_space = torch.cat([(one.beta.mean > 0) & (one.beta_fit.r2 >= GOOD_FIT) for one in figures])
    share = flags.double().mean().item()
    verdict = "decays as the method assumes" if share >= 0.9 else "does not decay as the method assumes everywhere"
    if share < 0.5:
        verdict = "does not decay as the method assumes in most heads"
    return (
        f"Attention {verdict}. Of {len(flags)} heads and noise levels, it falls exponentially with both distances (R² "
        f"of at least {GOOD_FIT:g}) in {int(flags.sum())}, with temporal distance in {int(in_time.sum())}, with "
        f"spatial distance in {int(in_space.sum())}. The median alpha is {_median(figures, 'alpha')} a latent frame, "
        f"the median beta {_median(figures, 'beta')} a token."
    )


def _median(figures: Sequence[LayerFigures], name: str) -> str:
    rates = torch.cat([getattr(one, name).mean for one in figures])
    return f"{rates.nanmedian().item():.3g}"


def _others(figures: Sequence[LayerFigures]) -> str:
    """The heads that do not decay, those at most noise levels first."""
    missing: Counter[tuple[int, int]] = Counter()
    for one in figures:
        missing.update((one.layer, head) for head in (~decaying(one)).nonzero().flatten().tolist())
    if not missing:
        return "Every head decays at every noise level."
    named = ", ".join(f"layer {layer} head {head}" for (layer, head), _ in missing.most_common(_NAMED))
    more = f" and {len(missing) - _NAMED} more (decay.json has all)" if len(missing) > _NAMED else ""
    return f"Heads that do not, at one noise level or more: {named}{more}."


def _kinds(figures: Sequence[LayerFigures]) -> str:
    counts = Counter(kind for one in figures for kind in one.kinds)
    total = sum(counts.values())
    words = ", ".join(f"{count / total:.0%} {kind}" for kind, count in counts.most_common())
    first = torch.cat([one.first.mean for one in figures])
    return f"Of the heads {words}; the first frame holds {first.mean():.1%} of the mass, {first.max():.1%} at most."


def _keeps(job: Job, figures: Sequence[LayerFigures]) -> list[str]:
    found = []
    for candidate in job.candidates:
        kept = torch.cat([one.kept[candidate.name].mean for one in figures])
        output = torch.cat([one.output[candidate.name].mean for one in figures])
        found.append(
            f"{candidate.name} keeps {kept.mean():.1%} of the mass ({kept.min():.1%} in its worst head), which moves "
            f"rows of attention by {2 * (1 - kept.mean()):.3f} in L1 and a head's output by {output.mean():.1%}."
        )
    return found


def _settings(job: Job, velocities: Sequence[Velocity], found: Sequence[Setting]) -> list[str]:
    if not found:
        lowest = min(v.sigma for v in velocities)
        least = min((v for v in velocities if v.sigma == lowest), key=lambda v: v.mean)
        return [
            f"No pattern keeps the velocity's error under {job.error:g} at the lowest noise level: the least is "
            f"{least.mean:.3f}, of {least.pattern} with {least.dense_layers} dense layers at sigma {least.sigma:g}. "
            "Without tuning, only dense attention keeps this model's velocity that near."
        ]
    best = found[0]
    steps = "" if best.dense_steps is None else f", the first {best.dense_steps} of {job.config.model.steps} steps"
    dense = (
        f"all layers dense from sigma {best.dense_sigma:.2f} on{steps}"
        if best.dense_sigma is not None
        else "no dense noise levels"
    )
    return [
        f"The cheapest setting whose velocity stays within {job.error:g} of dense's, without tuning: {best.pattern}, "
        f"{best.dense_layers} dense layers and {dense}. Its error is {best.error:.3f}; attention takes "
        f"{best.attention / 1e12:.3g} TFLOPs a forward, {best.attention_share:.0%} of dense attention's, and a forward "
        f"{best.share:.0%} of a dense one's FLOPs."
    ]


def as_json(found: Sequence[Setting]) -> list[dict[str, object]]:
    """The settings as decay.json has them."""
    return [asdict(setting) for setting in found]
