"""Temporal rotary embedding past the native length, against a plain restatement of the frequency tables."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.models.rope import KINDS, TemporalRope


def restated(kind, theta, pairs, native, k, frames):
    """Angle of frame p and pair j, one by one."""
    table = []
    for p in range(frames):
        row = []
        for j in range(pairs):
            position, frequency = float(p), theta ** (-2 * j / (2 * pairs))
            if frames > native and kind == "interpolate":
                position = p * (native - 1) / (frames - 1)
            if frames > native and kind == "riflex" and j == k - 1:
                frequency = 0.9 * 2 * math.pi / frames
            row.append(position * frequency)
        table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@given(
    kind=st.sampled_from(KINDS), theta=st.sampled_from([256.0, 10000.0]), pairs=st.integers(1, 22),
    native=st.integers(1, 40), frames=st.integers(1, 90), data=st.data(),
)  # fmt: skip
def test_tables_are_the_restated_ones(kind, theta, pairs, native, frames, data):
    k = data.draw(st.integers(1, pairs))
    own = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    kept = own.clone()
    got = TemporalRope(kind, native, k).angles(own, frames)
    torch.testing.assert_close(got, restated(kind, theta, pairs, native, k, frames), rtol=1e-12, atol=1e-12)
    assert torch.equal(own, kept)


@pytest.mark.parametrize("frames", [41, 81])
def test_what_the_options_are_for(frames):
    """Wan: 21 latent frames of native length; 44 of a head's 128 channels turn with time."""
    own = 10000 ** (-torch.arange(22, dtype=torch.float64) / 22)
    ordinary, riflex, squeezed = (TemporalRope(kind, 21, 6).angles(own, frames) for kind in KINDS)
    assert torch.equal(ordinary, torch.outer(torch.arange(frames, dtype=torch.float64), own))
    changed = (riflex != ordinary).any(0)
    assert changed.tolist() == [pair == 5 for pair in range(22)]
    assert 0.8 * 2 * math.pi < riflex[-1, 5] < 2 * math.pi  # nearly one turn in the whole clip
    torch.testing.assert_close(squeezed[-1], 20 * own, rtol=1e-12, atol=0)  # the last frame lies where training's did
    assert not any(TemporalRope(kind, 21, 6).changes(21) for kind in KINDS)
