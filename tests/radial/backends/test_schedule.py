"""The schedule and the lists that GPU kernels read, and the exact check at sampled tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from radial import Paper, Released, VideoGrid, attention_over, build_layout
from radial.backends.fa4.schedule import Schedule
from radial.backends.flashinfer import page_lists
from radial.backends.lists import block_lists, masked_counts, padded_lists
from radial.sampled_errors import sampled_errors

grids = st.builds(
    VideoGrid, st.integers(1, 12), st.integers(4, 20), st.integers(4, 20), st.sampled_from([0, 1, 100, 256])
)


@given(grids, st.sampled_from([16, 64, 128]), st.sampled_from(["forward", "backward"]))
def test_every_tile_is_issued_once_and_whole_lists_first(grid, block, direction):
    layout = build_layout(Released(), grid, block)
    counts = layout.row_offsets.diff()
    schedule = Schedule.of(counts, grid, block, multiprocessors=7, direction=direction)
    assert sorted(schedule.order.tolist()) == list(range(layout.blocks))
    assert ((schedule.start >= 0) & (schedule.start < 1)).all()
    issued = counts[schedule.order]
    long = issued > 2 * counts.median()
    assert long.int().diff().le(0).all()
    assert (schedule.start[schedule.order[long]] == 0).all()


@given(grids, st.sampled_from([16, 64]), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_walked_lists_are_rings_of_the_layout(grid, block, backwards, last_first, seed):
    layout = build_layout(Paper(), grid, block)
    start = torch.rand(layout.blocks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lists = padded_lists(layout.row_offsets, layout.columns, start, backwards=backwards, last_first=last_first)
    offsets = layout.row_offsets.tolist()
    for row, padded in enumerate(lists.tolist()):
        columns = layout.columns[offsets[row] : offsets[row + 1]].tolist()
        walk = padded[: len(columns)]
        assert not any(padded[len(columns) :])
        ring = columns[:-1] if last_first else columns
        if backwards:
            walk, ring = walk[::-1], ring[::-1]
        if last_first:
            first, walk = (walk[0], walk[1:]) if backwards else (walk[-1], walk[:-1])
            assert first == columns[-1]
        turn = int(len(ring) * start[row])
        assert walk == ring[turn:] + ring[:turn]


@pytest.mark.parametrize("backward", [False, True])
@given(grid=grids, lengths=st.lists(st.integers(0, 256), min_size=1, max_size=3))
def test_masked_and_full_lists_hold_what_each_sample_reaches(backward, grid, lengths):
    block = 64
    layout = build_layout(Released(), grid, block)
    valid = grid.video_tokens + torch.tensor(lengths).clamp(max=grid.text_tokens)
    lists = block_lists(layout, backward=backward, masks=True, scheduled=False)
    counts = masked_counts(layout, valid.int(), backward=backward)
    for sample, keys in enumerate(valid.tolist()):
        found = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool)
        for tile in range(layout.blocks):
            masked = lists.masked[0, 0, tile, : counts[sample, 0, tile]].long()
            full = lists.full[0, 0, tile, : lists.full_count[0, 0, tile]].long()
            assert not set(masked.tolist()) & set(full.tolist())
            found[tile, masked] = found[tile, full] = True
        found = found.T if backward else found
        expected = layout.mask()
        expected[:, -(-keys // block) :] = False
        assert torch.equal(found, expected)


@given(grids, st.sampled_from([16, 128]))
def test_pages_are_the_tokens_of_the_kept_blocks(grid, block):
    layout = build_layout(Released(), grid, block)
    offsets, pages, page = page_lists(layout)
    token = torch.arange(grid.tokens)
    for row, mask in enumerate(layout.mask()):
        mine = pages[offsets[row] : offsets[row + 1]].long()
        assert torch.equal((mine[:, None] * page + torch.arange(page)).flatten(), token[mask[token // block]])


def test_the_sampled_check_finds_a_block_too_few():
    torch.manual_seed(0)
    grid = VideoGrid(6, 8, 12, 30)
    layout = build_layout(Released(), grid, 64)
    inputs = [torch.randn(1, grid.tokens, 1, 32, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, grid.tokens, 1, 32)
    tokens = torch.arange(0, grid.tokens, 5)

    def errors(pattern) -> list[float]:
        out = attention_over(*inputs, build_layout(pattern, grid, 64), backend="torch")
        results = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
        return sampled_errors(
            layout, [t[0, :, 0].detach() for t in (*inputs, grad)], [t[0, :, 0] for t in results], tokens
        )

    assert max(errors(Released())) < 1e-5
    assert min(errors(Released(rule="hunyuan"))) > 1e-2
