"""The released mask and the paper's against their definitions, and the figures that are published for them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from radial import Dense, Paper, RadialError, Released, VideoGrid, build_layout, make_pattern
from tests.helpers.oracles import cover, paper_tokens, released_blocks


def complete_part(layout):
    c = layout.complete_blocks
    return layout.mask()[:c, :c]


def rows_with_blocks(mask):
    """The rows that the definition fills; the others are what the oracle knows nothing of."""
    return mask.any(1)


@pytest.mark.parametrize("rule", ["wan", "hunyuan", "ports"])
@pytest.mark.parametrize(
    ("s", "frames", "block", "decay"),
    [
        (256, 9, 64, 1.0),
        (256, 9, 128, 0.3),
        (200, 12, 64, 1.0),
        (880, 6, 128, 1.0),
        (1560, 5, 128, 0.8),
        (1590, 5, 128, 2.0),
        (397, 11, 64, 0.55),
        (128, 40, 128, 1.0),
        (96, 40, 32, 0.95),
        (64, 20, 64, 1.0),
    ],
)
def test_released_is_bit_identical_to_its_definition(s, frames, block, decay, rule):
    expected = released_blocks(s, frames, block, decay, rule)
    got = complete_part(build_layout(Released(decay, rule), VideoGrid(frames, 1, s), block))
    rows = rows_with_blocks(expected)
    assert torch.equal(got[rows], expected[rows])
    assert got.any(1).all()


@hypothesis_settings(max_examples=60)
@example(s=210, frames=5, block=16, decay=1.0624999701976776, rule="wan")  # a window of 33.99999904 tokens keeps 34
@given(
    s=st.integers(17, 210),
    frames=st.integers(1, 14),
    block=st.sampled_from([16, 32, 64]),
    decay=st.floats(0.05, 3.0),
    rule=st.sampled_from(["wan", "hunyuan", "ports"]),
)
def test_released_on_any_shape(s, frames, block, decay, rule):
    expected = released_blocks(s, frames, block, decay, rule)
    layout = build_layout(Released(decay, rule), VideoGrid(frames, 1, s), block)
    got = complete_part(layout)
    rows = rows_with_blocks(expected)
    assert torch.equal(got[rows], expected[rows])
    # rows that the definition leaves empty: the union of their nearest non-empty neighbours, or everything
    for row in (~rows).nonzero().flatten().tolist():
        above = [r for r in range(row) if rows[r]][-1:]
        below = [r for r in range(row + 1, len(rows)) if rows[r]][:1]
        neighbours = above + below
        union = expected[neighbours].any(0) if neighbours else torch.ones(len(rows), dtype=torch.bool)
        assert torch.equal(got[row], union)


@hypothesis_settings(max_examples=40)
@given(s=st.integers(1, 60), frames=st.integers(1, 24), block=st.sampled_from([16, 32]))
def test_paper_covers_equation_4(s, frames, block):
    layout = build_layout(Paper(), VideoGrid(frames, 1, s), block)
    assert torch.equal(complete_part(layout), cover(paper_tokens(s, frames), block))


@pytest.mark.parametrize(
    ("rule", "s", "frames", "decay", "tokens", "sparsity"),
    [
        ("wan", 3840, 18, 0.2, 69_120, 0.7129),
        ("ports", 3840, 18, 0.2, 69_120, 0.7366),
        ("wan", 3840, 18, 1.0, 69_120, 0.5691),
        ("wan", 3600, 41, 1.0, 147_600, 0.7401),
        ("ports", 3600, 41, 1.0, 147_600, 0.7505),
        ("wan", 3600, 128, 1.0, 460_800, 0.8837),
        ("wan", 1590, 112, 1.0, 178_080, 0.8572),
        ("hunyuan", 3840, 30, 0.95, 115_200, 0.7254),
        ("hunyuan", 3600, 128, 0.95, 460_800, 0.8926),
    ],
)
def test_published_sparsities(rule, s, frames, decay, tokens, sparsity):
    layout = build_layout(Released(decay, rule), VideoGrid(frames, 1, s))
    assert layout.grid.tokens == tokens
    assert layout.video_sparsity == pytest.approx(sparsity, abs=5e-5)


@pytest.mark.parametrize("decay", [1e300, 1.7e308])
def test_a_window_past_the_frame_is_the_whole_frame(decay):
    grid = VideoGrid(6, 10, 20)
    widest = build_layout(Released(1e6), grid, 16)
    assert torch.equal(build_layout(Released(decay), grid, 16).mask(), widest.mask())


def test_blocks_grow_as_n_log_n():
    """Doubling the frames may at most double n log n: 4 s^2 f log2 f is the paper's bound on the pairs."""
    s, block = 256, 64
    for frames in (16, 32, 64, 128, 256, 512):
        kept = build_layout(Released(), VideoGrid(frames, 1, s), block).kept
        bound = 4 * s**2 * frames * (frames.bit_length() - 1)
        assert kept * block**2 < bound
    small = build_layout(Released(), VideoGrid(256, 1, s), block).kept
    large = build_layout(Released(), VideoGrid(512, 1, s), block).kept
    assert large / small < 2 * 9 / 8 * 1.02


def test_dense_keeps_everything():
    layout = build_layout(Dense(), VideoGrid(3, 5, 7, 9), 16)
    assert layout.is_dense
    assert layout.mask().all()
    assert layout.sparsity == 0


@pytest.mark.parametrize("make", [lambda: Released(decay=-1.0), lambda: Released(rule="x"), lambda: make_pattern("x")])
def test_nonsense_patterns_are_refused(make):
    with pytest.raises(RadialError, match="expected"):
        make()
