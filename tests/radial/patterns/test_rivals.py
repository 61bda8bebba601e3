"""The field's other static patterns against their definitions, on any shape, and patterns on equal terms."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from radial import (
    PATTERNS,
    Dense,
    Local,
    Paper,
    Power,
    RadialError,
    Random,
    Released,
    ShiftedGroups,
    SlidingTile,
    Spatial,
    Temporal,
    VideoGrid,
    build_layout,
    make_pattern,
    radial_attention,
    with_share,
)
from radial.patterns.sliding_tile import tile_shape
from tests.helpers.oracles import (
    cover,
    group_blocks,
    masked_softmax,
    place_by_place,
    power_blocks,
    sliding_tile_tokens,
    window_blocks,
)

reaches = st.one_of(st.floats(0.05, 4), st.just(1e9))
shapes = {"s": st.integers(3, 90), "frames": st.integers(1, 12), "block": st.sampled_from([16, 32])}


def video_mask(pattern, grid: VideoGrid, block: int) -> torch.Tensor:
    complete = grid.video_tokens // block
    keys = pattern.video_blocks(grid, block)
    assert keys.dtype == torch.int64
    assert torch.equal(keys, keys.unique())
    out = torch.zeros(complete * complete, dtype=torch.bool)
    out[keys] = True
    return out.view(complete, complete)


@hypothesis_settings(max_examples=40)
@given(**shapes, reach=reaches)
def test_windows_with_and_without_a_sink(s, frames, block, reach):
    grid = VideoGrid(frames, 1, s)
    for pattern, sink in ((Local(reach), False), (Spatial(reach), True), (Temporal(reach), True)):
        assert torch.equal(video_mask(pattern, grid, block), window_blocks(s, frames, block, reach, sink))
    order = Temporal(reach).token_order(grid, block)
    assert order.tolist() == place_by_place(s, frames)
    assert Local(reach).token_order(grid, block) is Spatial(reach).token_order(grid, block) is None


@hypothesis_settings(max_examples=40)
@given(**shapes, reach=reaches)
def test_power_attention_looks_both_ways(s, frames, block, reach):
    assert torch.equal(video_mask(Power(reach), VideoGrid(frames, 1, s), block), power_blocks(s, frames, block, reach))


@hypothesis_settings(max_examples=40)
@given(**shapes, reach=st.floats(0.02, 1.5), heads=st.integers(1, 5))
def test_shifted_groups_are_rolled_in_the_second_half_of_the_heads(s, frames, block, reach, heads):
    grid = VideoGrid(frames, 1, s)
    complete = grid.video_tokens // block
    size = max(1, round(min(reach, 1) * complete))
    pattern = ShiftedGroups(reach)
    rolled = [False] * (heads - heads // 2) + [True] * (heads // 2)
    for head, second in enumerate(rolled):
        own = pattern.of_head(3, head, heads)
        assert torch.equal(video_mask(own, grid, block), group_blocks(complete, size, second))
    assert torch.equal(video_mask(pattern, grid, block), group_blocks(complete, size, False))


@hypothesis_settings(max_examples=40)
@example(size=(5, 6, 9), block=32, reach=0.5)
@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 13), st.integers(1, 13)),
    block=st.sampled_from([16, 32, 64]),
    reach=st.floats(0.05, 1.5),
)
def test_sliding_tiles_cover_the_windows_of_tiles(size, block, reach):
    grid, pattern = VideoGrid(*size), SlidingTile(reach)
    order, tokens = sliding_tile_tokens(size, tile_shape(block), reach)
    assert pattern.token_order(grid, block).tolist() == order
    assert torch.equal(video_mask(pattern, grid, block), cover(tokens, block))


@pytest.mark.parametrize(("block", "tile"), [(16, (1, 4, 4)), (32, (1, 4, 8)), (64, (1, 8, 8)), (128, (2, 8, 8))])
def test_a_tile_has_as_many_tokens_as_a_block_and_where_tiles_divide_every_tile_sees_equally_many(block, tile):
    assert tile_shape(block) == tile
    grid = VideoGrid(5 * tile[0], 4 * tile[1], 3 * tile[2])
    mask = video_mask(SlidingTile(0.5), grid, block)
    assert mask.sum(1).unique().tolist() == [3 * 3 * 1]  # windows of 3, 3 and 1 among 5 x 4 x 3 tiles
    assert torch.equal(mask, cover(sliding_tile_tokens((grid.frames, grid.height, grid.width), tile, 0.5)[1], block))


@hypothesis_settings(max_examples=20)
@given(s=st.integers(20, 80), frames=st.integers(4, 20), seed=st.integers(0, 9))
def test_random_keeps_as_many_blocks_as_the_released_mask(s, frames, seed):
    like, grid = Released(), VideoGrid(frames, 1, s)
    first, again = (video_mask(Random(like, seed), grid, 16) for _ in range(2))
    assert torch.equal(first, again)
    assert first.sum() == len(like.video_blocks(grid, 16))
    assert video_mask(Random(like, seed, reach=0.3), grid, 16).sum() == round(0.3 * first.numel())


def test_random_blocks_lie_everywhere_and_differ_by_seed_head_and_layer():
    grid = VideoGrid(64, 8, 16)
    drawn = Random(Released(), per_head=True)
    assert drawn.by_head and not Random(Released()).by_head
    assert Random(Released()).of_head(3, 1, 4) == Random(Released())
    masks = [video_mask(Random(Released(), seed), grid, 32) for seed in (0, 1)]
    masks += [video_mask(drawn.of_head(layer, head, 4), grid, 32) for layer, head in ((0, 1), (1, 0), (1, 1), (39, 3))]
    kept = masks[0].double().mean()
    for i, mask in enumerate(masks):
        assert (mask.double().mean(0) - kept).abs().max() < 0.1 > (mask.double().mean(1) - kept).abs().max()
        for other in masks[:i]:
            assert abs((mask & other).double().mean() - kept**2) < 0.002  # as independent draws meet
    assert make_pattern("random", decay=0.5, rule="hunyuan") == Random(Released(0.5, "hunyuan"))
    assert make_pattern("random", per_head=True) == drawn


@hypothesis_settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)),
    text=st.sampled_from([0, 1, 17]),
    pattern=st.sampled_from([Temporal(0.5), SlidingTile(0.4), Spatial(0.3), Power(0.2)]),
    block=st.sampled_from([16, 32]),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_in_the_patterns_own_order_of_tokens(size, text, pattern, block, masked, seed):
    """Outputs and gradients in raster order against a float64 softmax over pairs of raster tokens."""
    grid = VideoGrid(*size, text)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(2, grid.tokens, 2, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    lengths = torch.randint(0, text + 1, (2,), generator=generator) if masked and text else None

    def results(out):
        return [out, *torch.autograd.grad(out, inputs, grad)]

    expected = results(masked_softmax(q, k, v, build_layout(pattern, grid, block), lengths, 8**-0.5))
    given = {"block": block, "text_lengths": lengths, "backend": "torch"}
    for ours, theirs in zip(results(radial_attention(q, k, v, grid, pattern, **given)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


SOLVABLE = [kind() for kind in PATTERNS.values() if kind.parameter]
GRID = VideoGrid(16, 12, 20)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("pattern", SOLVABLE, ids=lambda pattern: pattern.name)
def test_a_share_is_met_as_nearly_as_the_pattern_can(pattern, share):
    """No value of the parameter on a fine scale comes nearer by more than the tolerance."""

    def of(value):
        layout = build_layout(type(pattern)(**{pattern.parameter: value}), GRID, 32)
        return layout.kept / layout.blocks**2

    found = with_share(pattern, GRID, 32, share)
    ours = abs(of(getattr(found, pattern.parameter)) - share)
    low, high = pattern.bounds(GRID)
    scale = torch.logspace(torch.log2(torch.tensor(low)), torch.log2(torch.tensor(high)), 80, base=2).tolist()
    assert ours <= min(abs(of(value) - share) for value in scale) + 2e-3 * share
    assert with_share(pattern, GRID, 32, share) is found


@pytest.mark.parametrize(("share", "off"), [(0.02, 0.1), (0.05, 0.07), (0.12, 1e-3), (0.15, 1e-3), (1.0, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_a_share_counts_rows_that_are_filled(share, off, seed):
    """On few blocks, where a small draw leaves rows empty: nothing drawn would be everything kept."""
    grid = VideoGrid(33, 9, 16)
    found = build_layout(with_share(Random(seed=seed), grid, 128, share), grid)
    assert 1 - found.sparsity == pytest.approx(share, abs=off)


def test_more_of_the_parameter_is_more_blocks():
    for pattern in SOLVABLE:
        low, high = pattern.bounds(GRID)
        kept = [
            len(type(pattern)(**{pattern.parameter: low * (high / low) ** (step / 8)}).video_blocks(GRID, 32))
            for step in range(9)
        ]
        assert kept == sorted(kept) and kept[0] < kept[-1], pattern


def test_what_a_share_cannot_be_of_is_refused():
    for pattern in (Paper(), Dense()):
        with pytest.raises(RadialError, match=f"share is 0.15, and pattern {pattern.name} has no parameter.*released"):
            with_share(pattern, GRID, 32, 0.15)
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(RadialError, match="share is .*expected a share"):
            with_share(Released(), GRID, 32, share)


@pytest.mark.parametrize("name", ["local", "spatial", "temporal", "sliding_tile", "power", "shifted", "random"])
def test_a_reach_is_a_positive_number(name):
    assert make_pattern(name, reach=0.7).reach == 0.7
    for reach in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RadialError, match=f"reach of pattern {name} is .*positive"):
            make_pattern(name, reach=reach)


def test_what_a_pattern_does_not_have_is_refused():
    with pytest.raises(RadialError, match="reach is 2.0, pattern released has none.*spatial"):
        make_pattern("released", reach=2.0)
    with pytest.raises(RadialError, match="per_head is of pattern random, spatial has none"):
        make_pattern("spatial", per_head=True)
    with pytest.raises(RadialError, match="pattern is 'spiral', expected one of released"):
        make_pattern("spiral")
