"""Decays that are put into q and k come out again; heads made to be of a kind are of that kind."""

import numpy as np
import pytest
import torch

from radial import VideoGrid
from train.decay.bins import Blocks, Geometry, QueryRows
from train.decay.fits import chained, fit_decay, kinds
from train.decay.masses import layer_masses


def places(grid):
    """The spatial distances between all places of a frame."""
    every = torch.arange(grid.tokens_per_frame)
    y, x = every // grid.width, every % grid.width
    return ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).double().sqrt()


def decaying(grid, alpha, beta, sink=0.0):
    """q and k, (tokens, 1, head_dim), with scores -alpha |j - i| - beta |l - k|, ``sink`` more on the first frame."""
    frames, s = grid.frames, grid.tokens_per_frame
    apart = (torch.arange(frames)[:, None] - torch.arange(frames)).abs().double()
    in_time = -alpha * apart
    in_time[:, 0] += sink
    q = torch.cat([in_time.repeat_interleave(s, 0), (-beta * places(grid)).repeat(frames, 1)], 1)
    k = torch.cat([torch.eye(frames).double().repeat_interleave(s, 0), torch.eye(s).double().repeat(frames, 1)], 1)
    return q[:, None] * q.shape[1] ** 0.5, k[:, None]


def measured(grid, q, k, rows, seed):
    geometry = Geometry(grid, Blocks("raster", 16))
    return geometry, layer_masses(q, k, geometry, QueryRows.draw(geometry, rows, seed), [])


@pytest.mark.parametrize("seed", range(10))
def test_a_known_decay_is_recovered(seed):
    torch.manual_seed(seed)
    grid = VideoGrid(9, 5, 7)
    alpha, beta = (0.15 + 1.2 * torch.rand(2)).tolist()
    q, k = decaying(grid, alpha, beta)
    words = torch.randn(q.shape[0], 1, 8, dtype=q.dtype), torch.randn(q.shape[0], 1, 8, dtype=q.dtype)
    q = torch.cat([q, words[0]], -1)  # scores with noise of standard deviation 0.4
    k = torch.cat([k, words[1] * 0.4 * (q.shape[-1] / 8) ** 0.5], -1)
    scale = (q.shape[-1] / (q.shape[-1] - 8)) ** 0.5
    q[..., :-8] *= scale
    geometry, found = measured(grid, q.float(), k.float(), 4, seed)
    in_time = fit_decay(torch.arange(8).double(), chained(found["temporal"].sum(0)), geometry.temporal_pairs)
    in_space = fit_decay(geometry.spatial_distance, chained(found["spatial"].sum(0)), geometry.spatial_pairs)
    assert in_time.rate.item() == pytest.approx(alpha, rel=0.05)
    assert in_space.rate.item() == pytest.approx(beta, rel=0.05)
    assert min(in_time.r2.item(), in_space.r2.item()) > 0.98


def test_an_exact_decay_is_exact_at_the_edges_too():
    """Rows at the edges share attention among fewer keys, which a plain mean over rows would take for distance."""
    grid = VideoGrid(7, 4, 4)
    _, found = measured(grid, *decaying(grid, 0.2, 0.0), 16, 0)
    curve = chained(found["temporal"].sum(0))[0]
    assert torch.allclose(curve, -0.2 * torch.arange(6).double(), atol=1e-9)


def test_points_below_machine_precision_are_left_out():
    distance, pairs = torch.arange(12).double(), torch.ones(12).double()
    curve = -3.0 * distance
    curve[6:] = -18.0  # a floor, where 2 ** -23 is exp(-15.9)
    fit = fit_decay(distance, curve, pairs)
    assert (fit.rate.item(), fit.start.item(), fit.r2.item()) == pytest.approx((3.0, 0.0, 1.0))
    assert fit_decay(distance[:2], curve[:2], pairs[:2]).rate.isnan()
    unreached = curve.clone()
    unreached[5:] = -torch.inf
    assert fit_decay(distance, unreached, pairs).rate.item() == pytest.approx(3.0)


def test_the_line_is_the_least_squares_one_weighted_by_pairs():
    """Of curves that are no exponentials, in which every point's weight tells."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.tensor([0.0, 1.2, 2.1, 2.9, 4.3, 5.0, 6.4], dtype=torch.float64)
    pairs = torch.tensor([9, 16, 14, 12, 7, 3, 1], dtype=torch.float64)
    curves = -0.5 * distance + torch.randn(3, 7, dtype=torch.float64, generator=generator)
    fit = fit_decay(distance, curves, pairs)
    for index, curve in enumerate(curves):
        slope, start = np.polyfit(distance.numpy(), curve.numpy(), 1, w=pairs.sqrt().numpy())
        left = np.average((curve - (start + slope * distance)) ** 2, weights=pairs)
        spread = np.average((curve - np.average(curve, weights=pairs)) ** 2, weights=pairs)
        found = (fit.rate[index].item(), fit.start[index].item(), fit.r2[index].item())
        assert found == pytest.approx((-slope, start, 1 - left / spread))


@pytest.mark.parametrize("sink", [0.49, 0.51])
@pytest.mark.parametrize("time", [0.49, 0.51])
@pytest.mark.parametrize("space", [0.49, 0.51])
def test_a_heads_kind_changes_at_half_of_the_mass(sink, time, space):
    """Near frames hold 10 of 16 pairs here, and the first three of the spatial distances as large a share."""
    temporal, spatial = torch.tensor([4.0, 6.0, 4.0, 2.0]).double(), torch.tensor([5.0, 4.0, 4.0, 3.0, 4.0]).double()
    both = min(time, space) - 0.1
    joint = torch.zeros(1, 4, 5, dtype=torch.float64)
    joint[0, 1, 2], joint[0, 0, 3], joint[0, 3, 0] = both, time - both, space - both
    joint[0, 2, 4] = 1 - time - space + both
    expected = "sink" if sink > 0.5 else "mixed"
    if sink < 0.5 and (time > 0.5) != (space > 0.5):
        expected = "spatial" if time > 0.5 else "temporal"
    assert kinds((1 - sink) * joint, torch.tensor([sink]), temporal, spatial) == [expected]


def test_kinds():
    grid = VideoGrid(12, 8, 8)
    made = {
        "spatial": decaying(grid, 3.0, 0.0),
        "temporal": decaying(grid, 0.0, 3.0),
        "mixed": decaying(grid, 0.0, 0.0),
        "sink": decaying(grid, 0.0, 0.1, sink=5.0),
    }
    q, k = (torch.cat([pair[part] for pair in made.values()], 1) for part in (0, 1))
    geometry, found = measured(grid, q, k, 16, 0)
    joint, first = found["joint"].mean(0), found["first"].mean(0)
    assert kinds(joint, first, geometry.temporal_pairs, geometry.spatial_pairs) == list(made)
