"""Block lists: both directions, text, partial blocks, counting."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radial import (
    Dense,
    LatentTime,
    Paper,
    RadialError,
    Released,
    VideoGrid,
    attention_over,
    build_layout,
    make_pattern,
)
from radial.layout import layout_of, make_layout

grids = st.builds(
    VideoGrid,
    frames=st.integers(1, 12),
    height=st.integers(1, 9),
    width=st.integers(1, 13),
    text_tokens=st.sampled_from([0, 1, 16, 37]),
)
patterns = st.one_of(
    st.just(Dense()),
    st.just(Paper()),
    st.builds(Released, decay=st.floats(0.1, 2), rule=st.sampled_from(["wan", "hunyuan", "ports"])),
)


@given(grid=grids, pattern=patterns, block=st.sampled_from([16, 32]))
def test_the_transpose_lists_the_same_blocks(grid, pattern, block):
    layout = build_layout(pattern, grid, block)
    mask = layout.mask()
    transpose = torch.zeros_like(mask)
    for column in range(layout.blocks):
        start, stop = layout.column_offsets[column : column + 2].tolist()
        rows = layout.rows[start:stop].long()
        assert torch.equal(rows, rows.sort().values)
        transpose[rows, column] = True
    assert torch.equal(mask, transpose)
    assert layout.kept == mask.sum() == len(layout.rows)
    assert all(t.dtype == torch.int32 for t in (layout.row_offsets, layout.columns, layout.column_offsets, layout.rows))


@given(grid=grids, pattern=patterns, block=st.sampled_from([16, 32]))
def test_what_the_released_code_leaves_undefined(grid, pattern, block):
    layout = build_layout(pattern, grid, block)
    mask, tail = layout.mask(), grid.video_tokens // block
    assert mask[tail:].all()
    assert mask[:, tail:].all()
    assert mask.any(1).all()


@pytest.mark.parametrize(("pixels", "filled"), [((129, 544, 960), 8), ((129, 720, 1280), 0)])
def test_query_blocks_that_would_see_the_text_alone_are_filled_and_counted(pixels, filled):
    grid = VideoGrid.from_pixels(*pixels, text_tokens=256)
    layout = build_layout(Released(rule="hunyuan"), grid)
    assert layout.filled_rows == filled
    assert layout.to("meta").filled_rows == filled
    tail = layout.blocks - layout.complete_blocks
    assert (layout.row_offsets.diff()[: layout.complete_blocks] > tail).all()


@given(grid=grids, pattern=patterns, block=st.sampled_from([16, 32]))
def test_density_counts_token_pairs(grid, pattern, block):
    layout = build_layout(pattern, grid, block)
    n = grid.tokens
    tokens = layout.mask().repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n]
    assert layout.density == pytest.approx(tokens.double().mean().item(), rel=1e-12)
    assert layout.flops(3, 8) == pytest.approx(4 * 3 * 8 * tokens.sum().item(), rel=1e-12)
    assert layout.sparsity == pytest.approx(1 - layout.mask().double().mean().item(), abs=1e-12)


def test_layouts_are_cached_by_their_arguments():
    grid = VideoGrid(5, 8, 16)
    assert build_layout(Released(), grid, 64) is build_layout(Released(1.0, "wan"), VideoGrid(5, 8, 16), 64)
    assert build_layout(Released(), grid, 64) is not build_layout(Released(0.5), grid, 64)
    assert build_layout(Released(), grid) is build_layout(Released(), grid, 128)


def test_a_pickled_layout_is_none_of_another_process():
    """Its number may be another's there: a copy has one of its own, and what it is read from."""
    grid = VideoGrid(5, 8, 16)
    own, beside = make_layout(Released(), grid, 16), make_layout(Dense(), grid, 16)
    own.derived("there", lambda: torch.ones(1))
    loaded = pickle.loads(pickle.dumps(own))
    assert layout_of(loaded.handle) is loaded and loaded.handle not in (own.handle, beside.handle)
    assert torch.equal(loaded.mask(), own.mask()) and loaded.filled_rows == own.filled_rows
    assert loaded.derived("there", lambda: None) is None


def test_a_copy_outlives_its_original():
    grid = VideoGrid(5, 8, 16)
    own = make_layout(make_pattern("temporal"), grid, 16)
    copied = copy.deepcopy(own)
    mask, q = own.mask(), torch.randn(1, grid.tokens, 1, 8)
    expected = attention_over(q, q, q, own, backend="torch")
    del own
    assert torch.equal(copied.mask(), mask)
    torch.testing.assert_close(attention_over(q, q, q, copied, backend="torch"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("block", [0, 8, 100])
def test_odd_block_sizes_are_refused(block):
    with pytest.raises(RadialError, match="power of two"):
        build_layout(Dense(), VideoGrid(2, 4, 4), block)


@pytest.mark.parametrize(
    ("pixels", "tokens"),
    [((321, 720, 1280), 291_600), ((161, 720, 1280), 147_600), ((81, 480, 832), 32_760)],
)
def test_pixels_become_tokens(pixels, tokens):
    assert VideoGrid.from_pixels(*pixels).tokens == tokens


def test_mochi_and_ti2v_grids():
    assert VideoGrid.from_pixels(163, 480, 848, vae=(6, 8, 8)).tokens_per_frame == 1590
    assert VideoGrid.from_pixels(121, 704, 1280, vae=(4, 16, 16)).tokens_per_frame == 880


@pytest.mark.parametrize(
    ("time", "lengths"),
    [
        (LatentTime(4), {1: 1, 5: 2, 81: 21, 321: 81}),
        (LatentTime(1), {1: 1, 64: 64}),
        (LatentTime(4, (17, 5)), {5: 2, 22: 7, 124: 37, 345: 102, 719: 212, 1433: 422}),  # as MiniMax-H3's pipeline
    ],
)
def test_frames_become_latent_frames_and_back(time, lengths):
    for frames, latents in lengths.items():
        time.check(frames)
        assert time.latents(frames) == latents
        assert time.frames(latents) == frames
    assert [frames for frames in range(30) if _possible(time, frames)] == list(range(time.rest, 30, time.step))
    assert all(time.latents(time.frames(latents)) == latents for latents in range(1, 30))


def _possible(time, frames):
    try:
        time.check(frames)
    except RadialError:
        return False
    return True


def test_impossible_clips_say_what_is_possible():
    with pytest.raises(RadialError, match=r"frames is 360, expected 17 x k \+ 5 .*use 345 or 362"):
        VideoGrid.from_pixels(360, 768, 1344, vae=(4, 16, 16), chunks=(17, 5))
    with pytest.raises(RadialError, match="use 317 or 321"):
        VideoGrid.from_pixels(320, 720, 1280)
    with pytest.raises(RadialError, match="height is 721.*use 720 or 736"):
        VideoGrid.from_pixels(321, 721, 1280)
