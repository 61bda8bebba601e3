"""UltraViCo's scaled scores against their definition, pair by pair in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from radial import Dense, RadialError, VideoGrid, radial_attention
from radial.patterns.ultravico import UltraViCo


def oracle(q, k, v, s, frames, reach, factor, words):
    """One head of one sample, (tokens, dim) float64, with so many valid words after the video."""
    video, out = s * frames, torch.zeros_like(q)
    for i in range(len(q)):
        scores = []
        for j in range(video + words):
            score = float(q[i] @ k[j]) / math.sqrt(q.shape[1])
            if i < video and j < video:
                if abs(i - j) > s * reach / 2 and score > 0:
                    score *= factor
                if i <= s and j > s * reach:
                    score = -math.inf
            scores.append(score)
        out[i] = torch.tensor(scores, dtype=torch.float64).softmax(0) @ v[: video + words]
    return out


@hypothesis_settings(max_examples=10)
@given(
    s=st.integers(1, 5), frames=st.integers(1, 6), text=st.integers(0, 3), reach=st.sampled_from([1, 2, 3, 1.5]),
    factor=st.sampled_from([0.25, 0.9, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_beyond_the_window_are_scaled(s, frames, text, reach, factor, seed):
    grid = VideoGrid(frames, 1, s, text_tokens=text)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (3 * torch.randn(2, grid.tokens, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    lengths = torch.tensor([text, text // 2])
    out = radial_attention(q, k, v, grid, UltraViCo(reach, factor), block=16, text_lengths=lengths)
    for sample in range(2):
        for head in range(2):
            one = (x[sample, :, head] for x in (q, k, v))
            expected = oracle(*one, s, frames, reach, factor, int(lengths[sample]))
            torch.testing.assert_close(out[sample, :, head], expected)


def test_within_the_native_length_it_is_dense_attention():
    grid = VideoGrid(4, 3, 5)
    q, k, v = torch.randn(3, 1, grid.tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    dense = radial_attention(q, k, v, grid, Dense())
    torch.testing.assert_close(radial_attention(q, k, v, grid, UltraViCo(8), block=16), dense)
    longer = radial_attention(q, k, v, grid, UltraViCo(2, 0.5), block=16)
    assert (longer - dense).abs().max() > 0.01


@pytest.mark.parametrize(("reach", "factor"), [(0, 0.9), (21, 0), (21, 1.5), (float("nan"), 0.9)])
def test_values_that_are_not_possible(reach, factor):
    with pytest.raises(RadialError, match="of pattern ultravico is"):
        UltraViCo(reach, factor)


def test_no_backend_takes_its_place():
    grid = VideoGrid(2, 2, 4)
    q = torch.randn(1, grid.tokens, 1, 8)
    with pytest.raises(RadialError, match="backend torch cannot scale scores, as ultravico does"):
        radial_attention(q, q, q, grid, UltraViCo(1), block=16, backend="torch")
