"""Masks that differ by head: lists, every backend's view of them, and attention against a float64 softmax."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from radial import (
    RadialError,
    Random,
    Released,
    ShiftedGroups,
    VideoGrid,
    attention_over,
    build_head_layouts,
    build_layout,
    radial_attention,
)
from radial.backends import AttentionCall, choose_backend
from radial.backends.flex import block_mask
from radial.backends.lists import block_lists, masked_counts
from radial.head_layouts import HeadLayouts
from tests.helpers.oracles import masked_softmax
from tests.helpers.patterns import ByHead

grids = st.builds(VideoGrid, st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), st.sampled_from([0, 1, 11, 40]))
patterns = st.sampled_from([ShiftedGroups(0.3), Random(reach=0.4, per_head=True), ByHead(), ByHead(tiled=True)])


@hypothesis_settings(max_examples=25)
@given(
    grid=grids,
    pattern=patterns,
    block=st.sampled_from([16, 32]),
    heads=st.integers(1, 4),
    layer=st.integers(0, 2),
    batch=st.integers(1, 2),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_torch_backend_equals_each_heads_masked_softmax(grid, pattern, block, heads, layer, batch, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, grid.tokens, heads, 8)
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4))
    lengths = torch.randint(0, grid.text_tokens + 1, (batch,), generator=generator) if masked else None
    layout = build_head_layouts(pattern, grid, block, layers=3, heads=heads).layer(layer)

    def results(out):
        return [out, *torch.autograd.grad(out, (q, k, v), grad.detach())]

    expected = []
    for head in range(heads):
        own = build_layout(pattern.of_head(layer, head, heads), grid, block)
        one = [x[:, :, head : head + 1] for x in (q, k, v)]
        expected.append(masked_softmax(*one, own, lengths, 8**-0.5))
        assert torch.equal(layout.mask()[head], own.mask())
    ours = results(attention_over(q, k, v, layout, text_lengths=lengths, backend="torch"))
    for got, right in zip(ours, results(torch.cat(expected, 2)), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)
    alone = radial_attention(q, k, v, grid, pattern, block=block, layer=layer, text_lengths=lengths, backend="torch")
    torch.testing.assert_close(alone, ours[0], rtol=0, atol=0)


@given(grid=grids, pattern=patterns, block=st.sampled_from([16, 32]))
def test_shares_and_operations_are_means_over_heads(grid, pattern, block):
    layout = build_head_layouts(pattern, grid, block, layers=2, heads=3).layer(1)
    each = [build_layout(pattern.of_head(1, head, 3), grid, block) for head in range(3)]
    assert layout.density == pytest.approx(sum(own.density for own in each) / 3)
    assert layout.sparsity == pytest.approx(sum(own.sparsity for own in each) / 3)
    assert layout.flops(3, 8) == pytest.approx(sum(own.flops(1, 8) for own in each))
    assert layout.masks().columns.dtype == torch.int16
    assert len(layout.masks().row_offsets) == len({pattern.of_head(1, head, 3) for head in range(3)})


def test_parts_hold_their_own_heads():
    whole = build_head_layouts(ByHead(), VideoGrid(5, 4, 6), 16, layers=2, heads=4)
    parts = [whole.part(index, 2) for index in range(2)]
    assert whole.part(1, 2) is parts[1]
    assert torch.equal(torch.cat([part.layer(1).mask() for part in parts]), whole.layer(1).mask())
    assert len({whole.handle, *(part.handle for part in parts)}) == 3
    assert torch.equal(parts[1].part(1, 2).layer(0).mask(), whole.layer(0).mask()[3:])


@pytest.mark.parametrize("backward", [False, True])
@hypothesis_settings(max_examples=40)
@given(grid=grids, pattern=patterns, lengths=st.lists(st.integers(0, 40), max_size=3))
def test_kernels_lists_of_each_head(backward, grid, pattern, lengths):
    """What a kernel walks for each head, tile and sample are the blocks of that head's mask that the sample reaches."""
    block, heads = 16, 3
    layout = build_head_layouts(pattern, grid, block, layers=1, heads=heads).layer(0)
    masks = bool(lengths)
    valid = grid.video_tokens + torch.tensor(lengths or [grid.text_tokens]).clamp(max=grid.text_tokens).int()
    lists = block_lists(layout, backward=backward, masks=masks, scheduled=False, device=torch.device("cpu"))
    counts = masked_counts(layout, valid, backward=backward) if masks else lists.masked_count
    assert lists.full.dtype == lists.full_count.dtype == torch.int32
    for sample, keys in enumerate(valid.tolist()):
        found = torch.zeros(heads, layout.blocks, layout.blocks, dtype=torch.bool)
        for head in range(heads):
            for tile in range(layout.blocks):
                masked = lists.masked[0, 0, tile, : counts[sample, 0, tile]].long()
                full = lists.full[0, head, tile, : lists.full_count[0, head, tile]].long()
                assert not set(masked.tolist()) & set(full.tolist())
                found[head, tile, masked] = found[head, tile, full] = True
        expected = layout.mask()
        if masks:
            expected[:, :, -(-keys // block) :] = False
        assert torch.equal(found.mT if backward else found, expected)
    one = lists.of_heads(slice(1, 2))
    assert torch.equal(one.full[0, 0], lists.full[0, 1]) and torch.equal(one.full_count[0, 0], lists.full_count[0, 1])


def test_scheduled_lists_of_each_head_are_rings(monkeypatch):
    """One order of tiles for all heads, whole rows first; each list starts at its tile's share of its own length."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Gpu", (), {"multi_processor_count": 7}))
    grid = VideoGrid(9, 8, 12, 30)
    layout = build_head_layouts(Random(reach=0.3, per_head=True), grid, 16, layers=1, heads=3).layer(0)
    for backward in (False, True):
        plain, turned = (
            block_lists(layout, backward=backward, masks=False, scheduled=scheduled, device=torch.device("cpu"))
            for scheduled in (False, True)
        )
        assert turned.order.sort().values.tolist() == list(range(layout.blocks))
        whole = set(range(layout.complete_blocks, layout.blocks))
        assert set(turned.order[: len(whole)].tolist()) == whole
        assert torch.equal(plain.full_count, turned.full_count)
        moved = 0
        for head in range(3):
            for tile in range(layout.blocks):
                count = plain.full_count[0, head, tile]
                a, b = (lists.full[0, head, tile, :count].tolist() for lists in (plain, turned))
                assert sorted(a) == sorted(b)
                moved += a != b
        assert moved > layout.blocks


@pytest.mark.parametrize("lengths", [None, [5, 64, 100]])
def test_flex_sees_each_heads_mask(lengths):
    grid = VideoGrid(5, 10, 11, 100)
    layouts = build_head_layouts(ByHead(), grid, 64, layers=3, heads=4)
    given_lengths = None if lengths is None else torch.tensor(lengths)
    for layer in (0, 2):
        layout = layouts.layer(layer)
        mask = block_mask(layout, 3, given_lengths, torch.device("cpu"))
        by_rows = listed(mask.kv_num_blocks, mask.kv_indices) | listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        by_keys = listed(mask.q_num_blocks, mask.q_indices) | listed(mask.full_q_num_blocks, mask.full_q_indices)
        assert torch.equal(by_keys.mT, by_rows)
        assert len(by_rows) == (1 if lengths is None else 3)
        for sample, blocks in enumerate(by_rows):
            assert torch.equal(blocks, expected_blocks(layout, lengths, sample))


def listed(counts, indices):
    """The blocks of padded lists: (samples, heads, tiles, blocks)."""
    assert counts.shape == indices.shape[:-1] and indices.is_contiguous()
    tiles = counts.shape[-1]
    out = torch.zeros(*counts.shape, tiles, dtype=torch.int64)
    counted = torch.arange(indices.shape[-1]) < counts[..., None]
    return out.scatter_add_(-1, indices.long(), counted.long()).bool()


def expected_blocks(layout, lengths, sample):
    expected = layout.mask()
    if lengths is not None:
        expected[:, :, -(-(layout.grid.video_tokens + lengths[sample]) // layout.block) :] = False
    return expected


def test_who_serves_masks_that_differ_by_head(monkeypatch):
    from radial.backends import flashinfer
    from radial.backends.fa4 import backend as fa4

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for module in (fa4, flashinfer):
        monkeypatch.setattr(module, "import_problem", lambda *_: None)
    layouts = build_head_layouts(ByHead(), VideoGrid(9, 16, 16, 64), 128, layers=4, heads=2)
    small = build_head_layouts(ByHead(), VideoGrid(9, 16, 16, 64), 64, layers=4, heads=2)
    large = build_head_layouts(ByHead(), VideoGrid(81, 45, 80), 64, layers=40, heads=40)

    def call(layouts, device="cuda", needs_grad=False):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AttentionCall(torch.device(device), dtype, 128, needs_grad, False, layouts)

    assert choose_backend(call(layouts)).name == choose_backend(call(layouts, needs_grad=True)).name == "fa4"
    assert choose_backend(call(small)).name == "flex"
    assert choose_backend(call(large)).name == "torch"
    assert choose_backend(call(layouts, "cpu")).name == "torch"
    with pytest.raises(RadialError, match="sdpa cannot serve this call: it has no masks, and the by_head pattern"):
        choose_backend(call(layouts, "cpu"), "sdpa")
    with pytest.raises(RadialError, match="flashinfer cannot serve this call: its lists serve all heads"):
        choose_backend(call(layouts), "flashinfer")
    with pytest.raises(RadialError, match="flex cannot serve this call: its lists of 40 heads in 40 layers take"):
        choose_backend(call(large), "flex")


class Layer(nn.Module):
    """A layer's self-attention, as a transformer block calls it."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return attention_over(q, k, v, self.layout, backend="torch").flatten(2) + x


@pytest.mark.parametrize("tiled", [False, True])
def test_compiled_layers_are_one_graph(tiled):
    """Layers with masks of their own share a graph, with the gradients of the plain layers."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    grid = VideoGrid(3, 4, 25, 7)
    layouts = build_head_layouts(ByHead(tiled=tiled), grid, 16, layers=4, heads=2)
    torch.manual_seed(0)
    layers = [Layer(layouts.layer(index)) for index in range(4)]
    x = torch.randn(2, grid.tokens, 32)
    outs = []
    for layer in layers:
        results = []
        for run in (torch.compile(layer, fullgraph=True, backend=backend), layer):
            layer.zero_grad()
            out = run(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)
        outs.append(results[0][0])
    layers[1].load_state_dict(layers[0].state_dict())
    assert not torch.equal(layers[0](x), layers[1](x))
    assert len(graphs) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_is_of_a_family_of_its_own(copied):
    grid, q = VideoGrid(5, 4, 6), torch.randn(1, 120, 2, 8)
    own = HeadLayouts(ByHead(), grid, 16, 3, 4, 2, 2).layer(1)
    expected, mask = attention_over(q, q, q, own, backend="torch"), own.mask()
    layer = copied(own)
    assert layer is layer.family.layer(1) and layer.handle != own.handle
    del own
    beside = HeadLayouts(ByHead(), grid, 16, 3, 4, 0, 2)
    assert torch.equal(layer.mask(), mask) and not torch.equal(beside.layer(1).mask(), mask)
    torch.testing.assert_close(attention_over(q, q, q, layer, backend="torch"), expected, rtol=0, atol=0)


def test_layouts_made_in_inference_serve_training():
    grid, pattern = VideoGrid(3, 4, 23), ShiftedGroups(0.3)
    build_head_layouts.cache_clear()
    q = torch.randn(1, grid.tokens, 2, 8)
    with torch.inference_mode():
        plain = radial_attention(q, q, q, grid, pattern, block=16)
    q.requires_grad_()
    out = radial_attention(q, q, q, grid, pattern, block=16)
    torch.testing.assert_close(out, plain)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_torch_accepts_the_operator():
    layouts = build_head_layouts(ByHead(), VideoGrid(3, 4, 25, 7), 64, layers=2, heads=2)
    shape = (1, layouts.grid.tokens, 2, 16)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    arguments = (q, k, v, torch.tensor([5]), 0.25, layouts.handle, "torch", layouts.layer(1).layer)
    torch.library.opcheck(torch.ops.radial.attention.default, arguments)


def test_heads_that_do_not_fit_are_said():
    grid = VideoGrid(2, 4, 4)
    layout = build_head_layouts(ShiftedGroups(), grid, 16, layers=1, heads=3).layer(0)
    x = torch.randn(1, 32, 2, 8)
    with pytest.raises(RadialError, match="q has 2 heads, the layout has masks for 3"):
        attention_over(x, x, x, layout)
    with pytest.raises(RadialError, match="block is 100"):
        build_head_layouts(ShiftedGroups(), grid, 100, layers=1, heads=3)
    assert build_head_layouts(Random(Released(), per_head=True), grid, 16, layers=1, heads=3).layer(0).is_dense is False
