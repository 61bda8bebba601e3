"""FlexAttention's tiles on GPUs that are not here: they divide the layout's blocks and fit the shared memory."""

import itertools

import pytest
import torch
from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

from radial import Released, VideoGrid, build_head_layouts, build_layout
from radial.backends import BACKENDS, AttentionCall
from radial.backends.flex import Flex, block_mask, kernel_options
from radial.layout import layout_of
from tests.helpers.patterns import ByHead

# KiB that a thread block can have, by compute capability: CUDA's programming guide, technical specifications
LIMITS = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
BF16, FP32 = torch.bfloat16, torch.float32
# Bytes that torch 2.11's templates take on sm80 to sm89, sm90, sm100 and sm120, as Triton 3.6 compiled them for these
# targets, for 75,600 tokens; keys are dtype, head dim and (queries, keys, stages, warps).
FORWARD = {
    (BF16, 64, (128, 64, 3, 4)): (49152, None, None, None),
    (BF16, 64, (128, 128, 3, 4)): (None, 114688, 115712, None),
    (BF16, 64, (128, 64, 2, 4)): (None, None, None, 32768),
    (BF16, 64, (64, 64, 3, 4)): (40960, 57344, 58368, 40960),
    (BF16, 128, (128, 64, 3, 8)): (98304, 131072, 132096, None),
    (BF16, 128, (128, 64, 2, 8)): (None, None, None, 65536),
    (BF16, 128, (64, 64, 3, 4)): (90112, 114688, 115712, 90112),
    (FP32, 64, (128, 32, 3, 4)): (82432, 82432, 82432, None),
    (FP32, 64, (128, 32, 2, 4)): (None, None, None, 66048),
    (FP32, 64, (64, 64, 3, 4)): (98304, 98304, 98304, 98304),
    (FP32, 128, (128, 32, 3, 4)): (147968, None, None, None),
    (FP32, 128, (32, 64, 3, 4)): (None, 155776, 155776, None),
    (FP32, 128, (128, 32, 2, 4)): (None, None, None, 115200),
    (FP32, 128, (64, 32, 2, 4)): (73984, 73984, 73984, 73984),
}
# of the backward, whose tiles are (shorter side, longer side, stages, warps)
BACKWARD = {
    (BF16, 64, (64, 64, 2, 4)): (35328, None, None, 35328),
    (BF16, 64, (64, 128, 3, 8)): (None, 82944, None, None),
    (BF16, 64, (64, 128, 3, 4)): (None, None, 100352, None),
    (BF16, 128, (64, 64, 2, 4)): (68096, None, None, None),
    (BF16, 128, (64, 64, 3, 4)): (84992, None, None, None),
    (BF16, 128, (64, 64, 1, 4)): (None, None, None, 57344),
    (BF16, 128, (64, 128, 3, 8)): (None, 164864, None, None),
    (BF16, 128, (64, 128, 3, 4)): (None, None, 198656, None),
    (FP32, 64, (16, 16, 1, 4)): (17408, 17408, 17408, 17408),
    (FP32, 128, (16, 16, 1, 4)): (33792, 33792, 33792, 33792),
}
CASES = [(gpu, dtype, dim) for gpu in LIMITS for dtype in (BF16, FP32) for dim in (64, 128)]


def taken(table, capability, dtype, dim, tiles):
    """Bytes of shared memory, as measured."""
    columns = {8: 0, 9: 1, 10: 2, 12: 3}
    found = table[dtype, dim, tiles][columns[capability[0]]]
    assert found is not None
    return found


def of_torch(monkeypatch, capability, dtype, dim):
    """Tiles of torch's own choice, forward and backward."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    (forward,) = CUDAConfigHeuristic().get_flex_attn_fwd_configs(dim, dtype)
    (backward,) = CUDAConfigHeuristic().get_flex_attn_bwd_configs(dim, dtype)
    assert (backward.block_m1, backward.block_n1) == (backward.block_n2, backward.block_m2)
    return (forward.block_m, forward.block_n, forward.num_stages, forward.num_warps), (
        *(backward.block_m1, backward.block_n1, backward.num_stages, backward.num_warps),
    )


def divides(tiles, block):
    return block % tiles[0] == 0 and block % tiles[1] == 0


def of_ours(block, dtype, dim):
    options = kernel_options(block, dtype, dim)
    return options and tuple(options[f"fwd_{name}"] for name in ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps"))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("capability", "dtype", "dim"), CASES)
def test_the_forward_fits(capability, dtype, dim, block, monkeypatch):
    tiles = of_ours(block, dtype, dim) or of_torch(monkeypatch, capability, dtype, dim)[0]
    assert divides(tiles, block)
    assert taken(FORWARD, capability, dtype, dim, tiles) <= LIMITS[capability] << 10


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("capability", "dtype", "dim"), CASES)
def test_the_backward_fits_or_is_refused(capability, dtype, dim, block, monkeypatch):
    _, tiles = of_torch(monkeypatch, capability, dtype, dim)
    assert taken(BACKWARD, capability, dtype, dim, tiles) <= LIMITS[capability] << 10
    layout = build_layout(Released(), VideoGrid(9, 16, 16), block)
    training, sampling = (
        BACKENDS["flex"].why_not(AttentionCall(torch.device("cuda"), dtype, dim, grad, False, layout))
        for grad in (True, False)
    )
    assert sampling is None
    assert (training is None) == divides(tiles, block)
    if training is not None:
        assert f"on compute capability {capability[0]}.{capability[1]} has tiles of 128 tokens" in training


@pytest.mark.parametrize("dim", [64, 128])
def test_torchs_own_forward_does_not_serve_where_it_is_replaced(dim, monkeypatch):
    """When torch chooses others, the replacement should go."""
    for capability in LIMITS:
        assert not divides(of_torch(monkeypatch, capability, BF16, dim)[0], 64)
    for capability, limit in LIMITS.items():
        own = of_torch(monkeypatch, capability, FP32, 128)[0]
        assert (taken(FORWARD, capability, FP32, 128, own) > limit << 10) == (limit == 99)


@pytest.mark.parametrize("dim", [16, 32])
def test_small_heads_are_left_to_torch(dim, monkeypatch):
    layout = build_layout(Released(), VideoGrid(9, 16, 16), 64)
    for capability in LIMITS:
        forward, backward = of_torch(monkeypatch, capability, BF16, dim)
        assert kernel_options(64, BF16, dim) is None and divides(forward, 64)
        call = AttentionCall(torch.device("cuda"), BF16, dim, True, False, layout)
        assert (BACKENDS["flex"].why_not(call) is None) == divides(backward, 64)


def test_heads_of_256_are_refused_where_they_do_not_fit(monkeypatch):
    layout = build_layout(Released(), VideoGrid(9, 16, 16))
    for capability, limit in LIMITS.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        reason = BACKENDS["flex"].why_not(AttentionCall(torch.device("cuda"), BF16, 256, True, False, layout))
        assert (reason is not None and "99 KiB" in reason) == (limit == 99)


def pairs_of(mask, tokens, block, *, backward):
    """(batch, heads, tokens, tokens) the pairs that a `BlockMask`'s lists of one direction compute, with its check."""
    names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices") if backward else (
        "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    )  # fmt: skip
    checked_count, checked, full_count, full = (getattr(mask, name) for name in names)
    batch, heads, tiles = full_count.shape
    side = tiles * block
    found = torch.zeros(batch, heads, side, side, dtype=torch.int)
    every = torch.arange(side)
    for sample, head, tile in itertools.product(range(batch), range(heads), range(tiles)):
        for counts, lists, checks in ((checked_count, checked, True), (full_count, full, False)):
            for other in lists[sample, head, tile, : counts[sample, head, tile]].tolist():
                query, key = (other, tile) if backward else (tile, other)
                rows, columns = (every[n * block : (n + 1) * block] for n in (query, key))
                seen = mask.mask_mod(sample, head, rows[:, None], columns) if checks else torch.tensor(True)
                found[sample, head, rows[:, None], columns] += seen.int()
    return found[..., :tokens, :tokens]


@pytest.mark.parametrize("text", [0, 1, 13, 40])
@pytest.mark.parametrize("lengths", [None, (0, 13, 40, 3), (3, 16, 0, 5)])
@pytest.mark.parametrize("by_head", [False, True])
def test_both_directions_lists_compute_each_pair_once(text, lengths, by_head):
    """The pairs of the block mask, without padding text; what the kernels make of them is for a GPU to show."""
    grid, block = VideoGrid(5, 5, 7, text), 16
    if by_head:
        layout = build_head_layouts(ByHead(), grid, block, layers=2, heads=4).layer(1)
        wanted = layout.mask()
    else:
        layout = build_layout(Released(0.5), grid, block)
        wanted = layout.mask()[None]
    device = torch.device("cpu")
    valid = torch.full((4,), text) if lengths is None else torch.tensor(lengths).clamp(max=text)
    Flex().prepare(AttentionCall(device, BF16, 64, True, lengths is not None, layout_of(layout.handle)))
    mask = block_mask(layout, 4, None if lengths is None else valid, device)
    whole = wanted.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : grid.tokens, : grid.tokens]
    counts = torch.arange(grid.tokens) < grid.video_tokens + valid[:, None]
    expected = whole[None] & counts[:, None, None]
    for backward in (False, True):
        found = pairs_of(mask, grid.tokens, block, backward=backward)
        assert torch.equal(found.expand_as(expected), expected.int())
