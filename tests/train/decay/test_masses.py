"""The sums over bins against a dense softmax in float64, and sampled rows against all rows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from radial import (
    Dense,
    Released,
    SlidingTile,
    Temporal,
    VideoGrid,
    attention_over,
    build_head_layouts,
    build_layout,
    make_pattern,
)
from tests.helpers.oracles import token_mask
from train.decay.bins import Blocks, Geometry, QueryRows, Tiling
from train.decay.fits import standard_error
from train.decay.masses import layer_masses

ALL = 10**6  # rows: every tile is taken whole


def random_qk(grid, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(grid.tokens, heads, 8, dtype=torch.float64, generator=generator) for _ in range(2))


def oracle(q, k, geometry, layouts, text):
    """Everything that `layer_masses` returns, summed pair of frames by pair of frames from the whole matrix."""
    grid = geometry.grid
    frames, s, video, heads = grid.frames, grid.tokens_per_frame, grid.video_tokens, q.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k[: video + text]) * q.shape[2] ** -0.5
    p = scores.softmax(-1)
    tile = geometry.tiling.of(grid)
    tiles = int(tile.max()) + 1
    y, x = torch.arange(s) // grid.width, torch.arange(s) % grid.width
    bins = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).double().sqrt().round().long()
    reach, zeros = int(bins.max()) + 1, torch.zeros
    f64 = {"dtype": torch.float64}
    mass, sink = zeros(heads, 2 * frames - 1, tiles, tiles, **f64), zeros(heads, frames, tiles, tiles, **f64)
    joint, first = zeros(heads, frames - 1, reach, **f64), zeros(heads, **f64)
    temporal = zeros(heads, 2, frames - 2, **f64)
    words = zeros(heads, **f64)
    seen = zeros(2 * frames - 1)
    for i, j in itertools.product(range(frames), range(frames)):
        part = p[:, i * s : (i + 1) * s, j * s : (j + 1) * s]
        for a, b in itertools.product(range(tiles), range(tiles)):
            value = part[:, tile == a][:, :, tile == b].sum(-1).mean(-1)
            if j == 0:
                sink[:, i, a, b] = value
            else:
                mass[:, frames - 1 + j - i, a, b] += value
        if j == 0:
            if i:
                first += part.sum((1, 2)) / s / (frames - 1)
            continue
        seen[frames - 1 + j - i] += 1
        if not i:
            continue
        for b in range(reach):
            joint[:, abs(i - j), b] += (part * (bins == b)).sum((1, 2)) / s / (frames - 1)
        further = j + (1 if j >= i else -1)
        for sides in [1, -1] if j == i else [further - j]:
            if 1 <= j + sides < frames:
                temporal[:, 0, abs(i - j)] += part.sum((1, 2)) / s / (frames - 1)
                other = p[:, i * s : (i + 1) * s, (j + sides) * s : (j + sides + 1) * s]
                temporal[:, 1, abs(i - j)] += other.sum((1, 2)) / s / (frames - 1)
    spatial = zeros(heads, 2, reach - 1, **f64)
    for place in range(s):
        rows = p[:, s + place : video : s, s:video].unflatten(2, (frames - 1, s)).sum(2)  # of all frames but the first
        for b in range(reach - 1):
            near, far = bins[place] == b, bins[place] == b + 1
            if near.any() and far.any():
                for side, of in enumerate((near, far)):
                    spatial[:, side, b] += (rows * of).sum((1, 2)) / of.sum() / s / (frames - 1)
    words = p[:, s:video, video:].sum(-1).mean(-1)
    kept = []
    for layout in layouts:
        mask = token_mask(layout)
        kept.append((p[:, :video] * mask[:video, : video + text]).sum(-1).mean(-1))
    text_rows = zeros(heads, frames + 1, **f64)
    if text:
        own = p[:, video:] if p.shape[1] == video + text else p[:, video : video + text]
        text_rows[:, :frames] = own[..., :video].unflatten(2, (frames, s)).sum(-1).mean(1)
        text_rows[:, frames] = own[..., video:].sum(-1).mean(1)
    text_keys = torch.stack(
        [p[:, :video, video:].sum(-1)[:, tile.repeat(frames) == a].mean(-1) for a in range(tiles)], 1
    )
    return {
        "mass": mass / seen.clamp(min=1)[:, None, None],
        "sink": sink,
        "text_keys": text_keys,
        "joint": joint[None],
        "temporal": temporal[None],
        "spatial": spatial[None],
        "first": first[None],
        "text": words[None],
        "kept": torch.stack(kept)[:, None],
        "text_rows": text_rows,
    }


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(2, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 6),
    text=st.sampled_from([(0, 0), (7, 7), (7, 3), (20, 0)]),
    tiling=st.sampled_from([Blocks("raster", 16), Blocks("patches", 5), Tiling(2, 3), Tiling(4, 4)]),
)
def test_all_rows_give_what_a_dense_softmax_gives(frames, height, width, text, tiling):
    padded, valid = text
    grid = VideoGrid(frames, height, width, padded)
    geometry = Geometry(grid, tiling)
    q, k = random_qk(grid)
    patterns = ((Released(), 16), (Dense(), 32), (Temporal(0.5), 16), (SlidingTile(0.4), 32))
    layouts = [build_layout(pattern, grid, block) for pattern, block in patterns]
    found = layer_masses(q, k, geometry, QueryRows.draw(geometry, ALL, 0), layouts, valid)
    expected = oracle(q, k, geometry, layouts, valid)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.allclose(found[name], tensor, atol=1e-12), name
    assert torch.allclose(found["joint"].sum((0, 2, 3)) + found["first"][0] + found["text"][0], torch.ones(()).double())


def test_what_is_kept_follows_the_order_of_tokens_and_each_heads_mask(monkeypatch):
    """Against outputs of one-hot values, which are positive where attention is computed."""
    grid = VideoGrid(5, 6, 7, 9)
    geometry, text = Geometry(grid, Blocks("raster", 16)), 4
    q, k = random_qk(grid, heads=3)
    layouts = [
        build_layout(make_pattern("temporal"), grid, 16),
        build_layout(make_pattern("sliding_tile"), grid, 16),
        build_head_layouts(make_pattern("random", per_head=True), grid, 16, layers=2, heads=3).layer(1),
    ]
    assert layouts[0].orders(q.device) is not None and layouts[1].orders(q.device) is not None
    monkeypatch.setattr("train.decay.masses.AT_ONCE", 1)  # heads one by one
    found = layer_masses(q, k, geometry, QueryRows.draw(geometry, ALL, 0), layouts, text)["kept"]
    p = (torch.einsum("qhd,khd->hqk", q, k[: grid.video_tokens + text]) * q.shape[2] ** -0.5).softmax(-1)
    wide = [F.pad(x, (0, grid.tokens - x.shape[2]))[None] for x in (q, k)]
    values = torch.eye(grid.tokens).double()[None, :, None].expand(-1, -1, 3, -1)
    for number, layout in enumerate(layouts):
        out = attention_over(*wide, values, layout, text_lengths=torch.tensor([text]), scale=q.shape[2] ** -0.5)[0]
        seen = out.transpose(0, 1)[:, : grid.video_tokens, : p.shape[2]] > 0
        assert torch.allclose(found[number, 0], (p[:, : grid.video_tokens] * seen).sum(-1).mean(-1), atol=1e-9)
        assert (found[number, 0] < 0.999).all()
    assert len(set(found[2, 0].tolist())) == 3


def test_chunks_of_heads_change_nothing(monkeypatch):
    grid = VideoGrid(3, 4, 5, 6)
    geometry = Geometry(grid, Tiling(2, 2))
    q, k = random_qk(grid, heads=3)
    rows = QueryRows.draw(geometry, 2, 0)
    whole = layer_masses(q, k, geometry, rows, [build_layout(Released(), grid, 16)], 4)
    monkeypatch.setattr("train.decay.masses.AT_ONCE", 1)
    single = layer_masses(q, k, geometry, rows, [build_layout(Released(), grid, 16)], 4)
    assert all(torch.allclose(single[name], whole[name], atol=1e-14) for name in whole)


def test_sampled_rows_are_unbiased_and_their_errors_are_right():
    grid = VideoGrid(4, 5, 6, 4)
    geometry = Geometry(grid, Blocks("raster", 8))  # the last tile of a frame has 6 tokens
    q, k = random_qk(grid, heads=3)
    layouts = [build_layout(Released(), grid, 16)]
    exact = layer_masses(q, k, geometry, QueryRows.draw(geometry, ALL, 0), layouts, 4)
    draws = [layer_masses(q, k, geometry, QueryRows.draw(geometry, 3, "seed", seed), layouts, 4) for seed in range(150)]
    for name in ("mass", "sink", "text_keys"):
        values = torch.stack([draw[name] for draw in draws])
        off = (values.mean(0) - exact[name]).abs() / (values.std(0) / 150**0.5).clamp(min=1e-9)
        assert off.mean() < 1.0 and off.max() < 5.5, name
    for name in ("first", "text", "joint", "temporal", "spatial", "kept"):
        along = 1 if name == "kept" else 0
        values = torch.stack([draw[name].mean(along) for draw in draws])
        spread = values.std(0)
        off = (values.mean(0) - exact[name].mean(along)).abs() / (spread / 150**0.5).clamp(min=1e-9)
        assert off.mean() < 1.6 and off.max() < 4.5, name
        said = torch.stack([standard_error(draw[name], along) for draw in draws])
        ratio = said.square().mean(0).sqrt() / spread.clamp(min=1e-9)
        middle = ratio[spread > 1e-6].median().item()
        # 3 of 8 rows without repeats vary less than independent ones, so the errors that are given are a little large
        assert 0.9 < middle < 1.6, name


@pytest.mark.parametrize("tiling", [Blocks("raster", 16), Tiling(3, 4), Blocks("patches", 7)])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_rows_are_drawn_in_every_tile(tiling, count):
    grid = VideoGrid(3, 7, 9)
    geometry = Geometry(grid, tiling)
    rows = QueryRows.draw(geometry, count, 0)
    assert torch.allclose(rows.share.sum(0), torch.ones(rows.replicates).double())
    assert (geometry.tile_of[rows.places] == rows.tile).all()
    assert all(len(set(frame.tolist())) == len(frame) for frame in rows.places)
    assert not rows.places[0].equal(rows.places[1])
    sizes = torch.bincount(geometry.tile_of)
    assert torch.bincount(rows.tile).equal(sizes.clamp(max=count))


def test_bins_of_distance_cover_every_pair():
    geometry = Geometry(VideoGrid(4, 5, 7), Tiling(2, 2))
    every = geometry.spatial_bins(torch.arange(35))
    assert torch.bincount(every.flatten(), minlength=geometry.reach).double().equal(geometry.spatial_pairs)
    apart = (torch.arange(3)[:, None] - torch.arange(3)).abs()
    assert torch.bincount(apart.flatten()).double().equal(geometry.temporal_pairs)
    assert geometry.spatial_distance[:2].tolist() == pytest.approx([0.0, every_first(geometry)])


def every_first(geometry):
    """The mean of the distances that round to 1: straight and diagonal neighbours."""
    height, width = geometry.grid.height, geometry.grid.width
    straight = 2 * (height * (width - 1) + width * (height - 1))
    diagonal = 4 * (height - 1) * (width - 1)
    return (straight + diagonal * 2**0.5) / (straight + diagonal)
