"""Noise levels: their distribution, their side, their independence of everything but (seed, step, sample)."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from train.flow import SigmaSchedule, StepDraw, noise_like

schedules = st.builds(
    SigmaSchedule,
    shift=st.floats(0.5, 12),
    density=st.sampled_from(["uniform", "logit_normal"]),
    mean=st.floats(-1, 1),
    std=st.floats(0.3, 2),
)


@given(schedule=schedules, quantile=st.floats(0.001, 0.999))
def test_quantiles_and_shares_are_inverse(schedule, quantile):
    sigma = schedule.at_quantile(quantile)
    assert 0 < sigma < 1
    assert schedule.share_above(sigma) == pytest.approx(1 - quantile, abs=1e-6)


def test_the_shift_is_the_schedulers():
    """Uniform u at the scheduler's own grid gives the scheduler's sigmas."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    u = torch.linspace(1000, 1, 1000) / 1000
    ours = [SigmaSchedule(shift=5.0).at_quantile(x) for x in u[1:].tolist()]
    torch.testing.assert_close(torch.tensor(ours), scheduler.sigmas[1:1000].float(), rtol=0, atol=1e-5)


def test_the_side_has_its_true_probability_and_bounds_sigma():
    schedule, threshold, steps = SigmaSchedule(shift=3.0), 0.9, 4000
    share = schedule.share_above(threshold)
    dense = 0
    for step in range(steps):
        draw = StepDraw.of(7, step, schedule, threshold)
        dense += draw.dense
        for sample in ("a", "b"):
            assert (draw.sigma(7, step, sample, schedule) >= threshold - 1e-9) == draw.dense
    assert dense / steps == pytest.approx(share, abs=4 * (share * (1 - share) / steps) ** 0.5)


def test_sides_together_follow_the_schedule():
    schedule = SigmaSchedule(shift=3.0)
    drawn = torch.tensor([StepDraw.of(1, s, schedule, 0.8).sigma(1, s, "x", schedule) for s in range(3000)])
    for quantile in (0.1, 0.5, 0.9):
        assert (drawn < schedule.at_quantile(quantile)).float().mean().item() == pytest.approx(quantile, abs=0.03)


def test_without_a_threshold_no_step_is_dense():
    schedule = SigmaSchedule(shift=3.0)
    assert not any(StepDraw.of(0, step, schedule, None).dense for step in range(200))


def test_draws_depend_on_their_key_alone():
    latent = torch.zeros(2, 3)
    torch.manual_seed(0)
    a = noise_like(latent, 1, 2, "sample")
    torch.manual_seed(5)
    assert torch.equal(a, noise_like(latent, 1, 2, "sample"))
    for other in ((2, 2, "sample"), (1, 3, "sample"), (1, 2, "other")):
        assert not torch.equal(a, noise_like(latent, *other))
    assert noise_like(torch.zeros(100_000), 1).std().item() == pytest.approx(1, abs=0.01)
