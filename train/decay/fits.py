"""Exponential fits to curves of attention over distance, and the kind of a head.

A curve is chained from ratios: of the query rows that have keys at distance d and at d + 1, the mass at d + 1 over the
mass at d. A plain mean at each distance would not do: far distances are seen from the clip's and the frame's edges
alone, where rows have fewer keys to share their attention with. For attention that is exactly C exp(-alpha d) in every
row, whatever each row's C, the curve is exp(-alpha d).

The fit is a weighted least-squares line through the curve's logarithm, each distance weighted by its number of pairs.
Points below float32's precision (2 ** -23 of the curve's largest) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("spatial", "temporal", "sink", "mixed")
KIND_RULE = (
    "sink: at least half of the mass lies on the first frame. Of the rest: spatial, when frames at distance 0 and 1 "
    "hold at least half and near places do not; temporal, when near places hold at least half and near frames do not; "
    "mixed: all others. Near places are those within the smallest spatial distance that covers as large a share of all "
    "pairs as the near frames do."
)
_SMALLEST = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Fit:
    """Lines through the logarithms of curves; NaN where fewer than three points are left.

    Attributes:
        rate: (...) what the curve falls by for each unit of distance: alpha or beta.
        start: (...) the line at distance 0, a natural logarithm.
        r2: (...) the share of the logarithm's weighted variance that the line explains.
    """

    rate: Tensor
    start: Tensor
    r2: Tensor


def chained(chain: Tensor) -> Tensor:
    """(..., 2, n - 1) sums of neighbouring distances -> (..., n) log of the curve, 0 at distance 0.

    From the first distance on to which no mass falls it is minus infinity.
    """
    ratio = (chain[..., 1, :].double() / chain[..., 0, :].double()).nan_to_num(0.0, posinf=0.0).log()
    return torch.cat([torch.zeros_like(ratio[..., :1]), ratio.cumsum(-1)], -1)


def fit_decay(distance: Tensor, log_curve: Tensor, pairs: Tensor) -> Fit:
    """The exponential decay of curves.

    Args:
        distance: (n,) of each point.
        log_curve: (..., n) natural logarithms.
        pairs: (n,) the weight of each point.
    """
    used = log_curve - log_curve.amax(-1, keepdim=True) > torch.tensor(_SMALLEST).log()
    weight = pairs * used
    total = weight.sum(-1, keepdim=True)
    y = log_curve.where(used, torch.zeros(()).to(log_curve))
    x_mean, y_mean = ((weight * z).sum(-1, keepdim=True) / total for z in (distance, y))
    x_off, y_off = distance - x_mean, y - y_mean
    across, along, up = ((weight * a * b).sum(-1) for a, b in ((x_off, x_off), (x_off, y_off), (y_off, y_off)))
    rate = -along / across
    start = (y_mean + rate[..., None] * x_mean).squeeze(-1)
    r2 = torch.where(up > 0, along**2 / (across * up), torch.ones_like(up))
    enough = used.sum(-1) >= 3
    return Fit(*(torch.where(enough, value, torch.nan) for value in (rate, start, r2)))


def kinds(joint: Tensor, first: Tensor, temporal_pairs: Tensor, spatial_pairs: Tensor) -> list[str]:
    """The kind of each head by `KIND_RULE`.

    Args:
        joint: (heads, temporal distances, bins of spatial distance) mass off the first frame and off text.
        first: (heads,) mass on the first frame.
        temporal_pairs, spatial_pairs: pairs at each distance.
    """
    covered = temporal_pairs[:2].sum() / temporal_pairs.sum()
    near = int((spatial_pairs.cumsum(0) / spatial_pairs.sum() < covered - 1e-12).sum()) + 1
    rest = joint.sum((1, 2)).clamp(min=1e-30)
    in_time = joint[:, :2].sum((1, 2)) / rest
    in_space = joint[:, :, :near].sum((1, 2)) / rest
    found = []
    for sink, time, space in zip(first.tolist(), in_time.tolist(), in_space.tolist(), strict=True):
        if sink >= 0.5:
            found.append("sink")
        elif (time >= 0.5) != (space >= 0.5):
            found.append("spatial" if time >= 0.5 else "temporal")
        else:
            found.append("mixed")
    return found


def standard_error(values: Tensor, over: int = 0) -> Tensor:
    """The standard error of the mean of independent values along a dimension; zero for a single one."""
    count = values.shape[over]
    return values.double().std(over) / count**0.5 if count > 1 else torch.zeros_like(values.double().mean(over))
